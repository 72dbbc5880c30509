// The packed attention as a TensorRT plugin for versions without Python plugins: JetPack 6's 10.3.
//
// It carries a cubin that `python -m dimefm_kernels.ahead_of_time` compiled and launches it through
// the driver; the engine holds the cubin, so that a runtime needs this library only. Build it on the
// device and load it before a network is built or an engine is read:
//
//   g++ -std=c++17 -O2 -fPIC -shared tensorrt_glue.cpp -o libdimefm_attention.so -lcuda
//
// Fields: cubin (bytes), entry (its symbol), grid_x, num_threads, shared_bytes, num_heads,
// data_type (nvinfer1::DataType of input and output). Input (B, N, 3 * H * D), output (B, N, H * D).
// Compiled against the headers of 10.3 and 10.16; not run: no TensorRT where this was written.

#include <NvInferRuntime.h>
#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

constexpr char kName[] = "DimeFMFusedAttentionQkv";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "";
constexpr int32_t kFailed = 1;

struct Settings {
    std::string cubin, entry;
    int32_t gridX = 0, numThreads = 0, sharedBytes = 0, numHeads = 0, dataType = 0;

    std::vector<PluginField> fields() const {
        return {
            {"cubin", cubin.data(), PluginFieldType::kCHAR, static_cast<int32_t>(cubin.size())},
            {"entry", entry.data(), PluginFieldType::kCHAR, static_cast<int32_t>(entry.size())},
            {"grid_x", &gridX, PluginFieldType::kINT32, 1},
            {"num_threads", &numThreads, PluginFieldType::kINT32, 1},
            {"shared_bytes", &sharedBytes, PluginFieldType::kINT32, 1},
            {"num_heads", &numHeads, PluginFieldType::kINT32, 1},
            {"data_type", &dataType, PluginFieldType::kINT32, 1},
        };
    }

    // False if a field is missing or of another type; ones we do not know are passed over.
    bool read(PluginFieldCollection const& given) {
        int32_t found = 0;
        for (int32_t i = 0; i < given.nbFields; ++i) {
            PluginField const& field = given.fields[i];
            for (auto const& [name, text] : {std::pair{"cubin", &cubin}, {"entry", &entry}}) {
                if (!std::strcmp(field.name, name) && field.type == PluginFieldType::kCHAR) {
                    text->assign(static_cast<char const*>(field.data), field.length);
                    ++found;
                }
            }
            for (auto const& [name, number] :
                 {std::pair{"grid_x", &gridX}, {"num_threads", &numThreads},
                  {"shared_bytes", &sharedBytes}, {"num_heads", &numHeads},
                  {"data_type", &dataType}}) {
                if (!std::strcmp(field.name, name) && field.type == PluginFieldType::kINT32) {
                    *number = *static_cast<int32_t const*>(field.data);
                    ++found;
                }
            }
        }
        return found == 7 && gridX > 0 && numThreads > 0 && sharedBytes >= 0 && numHeads > 0;
    }
};

class AttentionPlugin : public IPluginV3,
                        public IPluginV3OneCore,
                        public IPluginV3OneBuild,
                        public IPluginV3OneRuntime {
public:
    explicit AttentionPlugin(Settings settings) : settings_(std::move(settings)) {}

    ~AttentionPlugin() override {
        if (module_ != nullptr) cuModuleUnload(module_);
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override { return new AttentionPlugin(settings_); }
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType* outputs, int32_t, DataType const* inputs,
                               int32_t) const noexcept override {
        outputs[0] = inputs[0];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t,
                            DimsExprs* outputs, int32_t, IExprBuilder& build) noexcept override {
        if (inputs[0].nbDims != 3) return kFailed;
        outputs[0] = inputs[0];
        outputs[0].d[2] =
            build.operation(DimensionOperation::kFLOOR_DIV, *inputs[0].d[2], *build.constant(3));
        return 0;
    }

    bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* tensors, int32_t,
                                   int32_t) noexcept override {
        return tensors[at].desc.format == TensorFormat::kLINEAR &&
               tensors[at].desc.type == static_cast<DataType>(settings_.dataType);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return 0;
    }

    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*,
                          int32_t) noexcept override {
        return 0;
    }

    // One module per execution context: it belongs to the CUDA context that is current here.
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    int32_t enqueue(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override {
        if (module_ == nullptr && !load()) return kFailed;
        void const* qkv = inputs[0];
        void* out = outputs[0];
        int32_t items = static_cast<int32_t>(input[0].dims.d[0]) * settings_.numHeads;
        if (items == 0) return 0;
        void* arguments[] = {&qkv, &items, &out};
        int32_t const programs = std::min(items, 65535);  // CUDA's limit; they loop over the rest
        return cuLaunchKernel(function_, settings_.gridX, programs, 1, settings_.numThreads, 1, 1,
                              settings_.sharedBytes, stream, arguments, nullptr) != CUDA_SUCCESS;
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        fields_ = settings_.fields();
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

private:
    bool load() {
        if (cuModuleLoadData(&module_, settings_.cubin.data()) != CUDA_SUCCESS) return false;
        return cuModuleGetFunction(&function_, module_, settings_.entry.c_str()) == CUDA_SUCCESS &&
               cuFuncSetAttribute(function_, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                  settings_.sharedBytes) == CUDA_SUCCESS;
    }

    Settings settings_;
    CUmodule module_ = nullptr;
    CUfunction function_ = nullptr;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

class AttentionCreator : public IPluginCreatorV3One {
public:
    AttentionCreator() : fields_(Settings{}.fields()) {
        for (PluginField& field : fields_) field.data = nullptr;
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

    IPluginV3* createPlugin(char const*, PluginFieldCollection const* given,
                            TensorRTPhase) noexcept override {
        Settings settings;
        if (given == nullptr || !settings.read(*given)) return nullptr;
        return new AttentionPlugin(std::move(settings));
    }

private:
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

REGISTER_TENSORRT_PLUGIN(AttentionCreator);

}  // namespace
