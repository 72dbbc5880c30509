/* A stand-in for NVIDIA's driver library: the functions that runtime/cuda.py calls, with the
   driver's own prototypes, on the host's memory. No GPU is used.

   Work put on a stream is done when the stream is waited for, not before, and work put there
   while it is captured is done when the graph is launched: a missing wait or copy shows. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
typedef void (*Callback)(long);

enum { INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NO_CONTEXT = 201, IN_CAPTURE = 900 };

typedef struct Op {
    void *to;
    const void *from;
    size_t size;
    Callback call;
    long argument;
    struct Op *next;
} Op;

typedef struct {
    Op *first, **last;
} Queue;

typedef struct {
    Queue queue;
    Queue *captured;
} Stream;

typedef struct Block {
    char *start;
    size_t size;
    int is_pinned;
    struct Block *next;
} Block;

static Block *blocks;
static int context_marker, launches;
static _Thread_local int has_context;

/* What a test sets and reads. */
char fake_name[256] = "Orin";
int fake_major = 8, fake_minor = 7, fake_version = 12060, fake_count = 1;
int fake_allows_capture = 1;
size_t fake_free_bytes = (size_t)1 << 33;
size_t fake_live_bytes;
int fake_launches(void) { return launches; }

static CUresult allocate(void **out, size_t size, int is_pinned) {
    if (!has_context) return NO_CONTEXT;
    if (size == 0) return INVALID;
    if (size > fake_free_bytes) return OUT_OF_MEMORY;
    Block *block = malloc(sizeof *block);
    *block = (Block){malloc(size), size, is_pinned, blocks};
    memset(block->start, 0x7f, size); /* never zero by chance */
    blocks = block;
    fake_live_bytes += size;
    *out = block->start;
    return 0;
}

static CUresult release(void *start, int is_pinned) {
    for (Block **at = &blocks; *at; at = &(*at)->next) {
        if ((*at)->start != start || (*at)->is_pinned != is_pinned) continue;
        Block *block = *at;
        *at = block->next;
        fake_live_bytes -= block->size;
        free(block->start);
        free(block);
        return 0;
    }
    return INVALID;
}

static int is_inside(const void *start, size_t size, int is_pinned) {
    for (Block *b = blocks; b; b = b->next)
        if (b->is_pinned == is_pinned && (const char *)start >= b->start &&
            (const char *)start + size <= b->start + b->size)
            return 1;
    return 0;
}

static void push(Queue *queue, Op op) {
    Op *copy = malloc(sizeof *copy);
    *copy = op;
    copy->next = NULL;
    *queue->last = copy;
    queue->last = &copy->next;
}

static void begin(Queue *queue) {
    queue->first = NULL;
    queue->last = &queue->first;
}

static void empty(Queue *queue, int is_run) {
    for (Op *op = queue->first, *next; op; op = next) {
        next = op->next;
        if (is_run && op->call) op->call(op->argument);
        else if (is_run) memcpy(op->to, op->from, op->size);
        free(op);
    }
    begin(queue);
}

static void enqueue(Stream *stream, Op op) {
    push(stream->captured ? stream->captured : &stream->queue, op);
}

/* What the double of TensorRT puts on a stream. */
void fake_enqueue(void *stream, Callback call, long argument) {
    enqueue(stream, (Op){.call = call, .argument = argument});
}

CUresult cuInit(unsigned flags) { return flags ? INVALID : fake_count ? 0 : NO_DEVICE; }
CUresult cuDriverGetVersion(int *v) { *v = fake_version; return 0; }
CUresult cuDeviceGetCount(int *n) { *n = fake_count; return 0; }
CUresult cuDeviceGet(int *d, int i) { *d = i; return i < fake_count ? 0 : INVALID; }
CUresult cuDeviceGetName(char *name, int size, int device) {
    (void)device;
    snprintf(name, size, "%s", fake_name);
    return 0;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    if (attribute != 75 && attribute != 76) return INVALID;
    *value = attribute == 75 ? fake_major : fake_minor;
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    *context = &context_marker;
    return 0;
}
CUresult cuCtxSetCurrent(void *context) {
    has_context = context == &context_marker;
    return has_context ? 0 : INVALID;
}
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    return allocate((void **)address, size, 0);
}
CUresult cuMemFree_v2(CUdeviceptr address) { return release((void *)address, 0); }
CUresult cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    return flags ? INVALID : allocate(address, size, 1);
}
CUresult cuMemFreeHost(void *address) { return release(address, 1); }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *stream) {
    if (!is_inside((void *)to, size, 0) || !is_inside(from, size, 1)) return INVALID;
    enqueue(stream, (Op){.to = (void *)to, .from = from, .size = size});
    return 0;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *stream) {
    if (!is_inside(to, size, 1) || !is_inside((void *)from, size, 0)) return INVALID;
    enqueue(stream, (Op){.to = to, .from = (void *)from, .size = size});
    return 0;
}
CUresult cuStreamCreate(void **out, unsigned flags) {
    (void)flags;
    if (!has_context) return NO_CONTEXT;
    Stream *stream = malloc(sizeof *stream);
    stream->captured = NULL;
    begin(&stream->queue);
    *out = stream;
    return 0;
}
CUresult cuStreamDestroy_v2(void *stream) {
    empty(&((Stream *)stream)->queue, 0);
    free(stream);
    return 0;
}
CUresult cuStreamSynchronize(void *stream) {
    if (((Stream *)stream)->captured) return IN_CAPTURE;
    empty(&((Stream *)stream)->queue, 1);
    return 0;
}
CUresult cuStreamBeginCapture_v2(void *stream, int mode) {
    if (mode != 1 || ((Stream *)stream)->captured) return INVALID;
    if (!fake_allows_capture) return IN_CAPTURE;
    ((Stream *)stream)->captured = malloc(sizeof(Queue));
    begin(((Stream *)stream)->captured);
    return 0;
}
CUresult cuStreamEndCapture(void *stream, void **graph) {
    *graph = ((Stream *)stream)->captured;
    ((Stream *)stream)->captured = NULL;
    return *graph ? 0 : INVALID;
}
CUresult cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    if (flags) return INVALID;
    Queue *copy = malloc(sizeof *copy);
    begin(copy);
    for (Op *op = ((Queue *)graph)->first; op; op = op->next) push(copy, *op);
    *executable = copy;
    return 0;
}
CUresult cuGraphDestroy(void *graph) {
    empty(graph, 0);
    free(graph);
    return 0;
}
CUresult cuGraphExecDestroy(void *executable) { return cuGraphDestroy(executable); }
CUresult cuGraphLaunch(void *executable, void *stream) {
    launches++;
    for (Op *op = ((Queue *)executable)->first; op; op = op->next) enqueue(stream, *op);
    return 0;
}
CUresult cuGetErrorName(CUresult code, const char **name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == NO_DEVICE     ? "CUDA_ERROR_NO_DEVICE"
          : code == NO_CONTEXT    ? "CUDA_ERROR_INVALID_CONTEXT"
          : code == IN_CAPTURE    ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                                  : "CUDA_ERROR_INVALID_VALUE";
    return 0;
}
