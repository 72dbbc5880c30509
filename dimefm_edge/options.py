"""What each command takes: fields are flags, the text below a field is its help.

`--config run.toml` fills in what flags leave out: a command takes the settings of `RunConfig`
that it names in `from_config`. No torch here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from tyro.conf import Positional

from dimefm_edge import config as config_file
from dimefm_edge.bench_config import BenchConfig
from dimefm_edge.classify_config import ClassifyConfig
from dimefm_edge.config import RunConfig
from dimefm_edge.demo_config import DemoConfig
from dimefm_edge.eval_config import EvalConfig
from dimefm_edge.student_grid import FAMILIES

O = TypeVar("O", bound="CommonOptions")  # noqa: E741


@dataclass(frozen=True)
class CommonOptions:
    """Flags of every command."""

    from_config: ClassVar[dict[str, str]] = {}
    """Flag -> dotted name in RunConfig."""

    config: Path | None = None
    """TOML file that gives what flags give, such as a run's config.toml; flags win."""
    json: bool = False
    """Print one JSON object on stdout and nothing else there."""
    verbose: bool = False
    """Say more on stderr."""


@dataclass(frozen=True)
class TargetsOptions(CommonOptions):
    """List devices: budget, precision, specifications, and how well each is known."""


@dataclass(frozen=True)
class EstimateOptions(CommonOptions):
    """Estimate the latency of one model on a target, without the target."""

    from_config: ClassVar[dict[str, str]] = {"target": "target"}

    model: Positional[str] = ""
    """An ONNX file, a run, a bundle, a student (vit-tiny, vit-p16-w192-d6), `timm:NAME`, or a
    teacher."""
    rows: Path | None = None
    """Instead of a model, a CSV file of many: device, runtime, precision, timm_name_if_any,
    batch, resolution."""
    out: Path | None = None
    """Where that file goes with predicted_ms, low_ms, high_ms and basis added."""
    target: str = RunConfig.target
    """Device, with or without a power mode: jetson-orin@30w."""
    precision: str | None = None
    """fp32, fp16, int8 or fp8. Default: a quantised graph's own, else the target's."""
    batch_size: int = 1
    """Images per call."""
    image_size: int | None = None
    """Input side in pixels. Default: the model's own, else 224."""
    embed_dim: int = 512
    """Size of the embeddings of a named student or a timm model."""


@dataclass(frozen=True)
class CalibrateOptions(CommonOptions):
    """Measure this machine, so that estimates for `local` are its own. Takes some minutes."""

    precision: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    """What to measure."""
    threads: int = 0
    """Threads of one call; 0: one per physical core."""


@dataclass(frozen=True)
class FitOptions(CommonOptions):
    """Find the students that meet a latency budget, and choose one."""

    from_config: ClassVar[dict[str, str]] = {
        "target": "target",
        "teacher": "teacher",
        "latency_ms": "student.latency_ms",
        "image_size": "student.image_size",
        "max_memory_mib": "student.max_memory_mib",
    }

    elastic: str | None = None
    """A run of `distill --elastic`: choose among the students within it, by their top-1; target and
    teacher are its own where flags name none."""
    out: Path | None = None
    """Take the student that was chosen out of the elastic run, as a run of its own, here."""

    target: str = RunConfig.target
    """Device, with or without a power mode: jetson-orin@30w."""
    latency_ms: float | None = None
    """Budget for one image, in ms. Default: the target's, or half of the teacher's if less (all of
    it where no student takes half)."""
    teacher: str | None = None
    """Give it to consider students that inherit from it, its image size and embedding size."""
    image_size: int | None = None
    """Input side in pixels. Default: the teacher's, smaller ones too for its heirs; else 224."""
    embed_dim: int | None = None
    """Size of the embeddings. Default: the teacher's, else 512."""
    precision: str | None = None
    """What the student will run in. Default: the target's."""
    max_memory_mib: float | None = None
    """Limit of the student's weights and its largest operator's tensors, in MiB."""
    families: tuple[str, ...] = FAMILIES
    """Student families to look at: vit, hybrid, convnet, resnet (timm's), timm (a selection), or
    timm:NAME."""
    plot: Path | None = None
    """Write latency against score as a PNG here."""


@dataclass(frozen=True)
class SourceOptions(CommonOptions):
    """Images and sentences, and the teacher that embeds them."""

    from_config: ClassVar[dict[str, str]] = {
        "teacher": "teacher",
        "store": "store",
        "images": "data.images",
        "texts": "data.texts",
        "image_column": "data.image_column",
        "text_column": "data.text_column",
        "max_bad": "data.max_bad",
        "workers": "data.workers",
    }

    store: str | None = None
    """Folder of the embeddings, filled where it is not."""
    teacher: str = RunConfig.teacher
    """`sample`, an open_clip model (ARCHITECTURE:TAG_OR_FILE), `hf-hub:ORG/NAME`, or a folder."""
    images: tuple[str, ...] = ()
    """Folders, .tar shards, Parquet files, globs and brace patterns, or `scenes[:COUNT]`."""
    texts: tuple[str, ...] = ()
    """.txt, .jsonl, .csv or .parquet files, each also .gz, globs, or `scenes[:COUNT]`."""
    image_column: str = "image"
    """Column of images in Parquet files and Hugging Face data sets."""
    text_column: str = "text"
    """Column or key of sentences in .jsonl, .csv and .parquet files."""
    max_bad: float = 0.1
    """Stop when more images, or more sentences, than this cannot be used: a share of them below
    1, else a count."""
    workers: int = 0
    """Decoding workers; 0 chooses."""


@dataclass(frozen=True)
class EmbedOptions(SourceOptions):
    """Embed images and sentences with a teacher; runs share the store. Resumes by itself."""

    batch_size: int = 256
    """Images per call of the teacher; twice as many sentences."""
    verify: bool = False
    """Read everything that was there already and compare its checksums."""


@dataclass(frozen=True)
class CorpusOptions(SourceOptions):
    """Keep the sentences that the teacher finds near to images, once each. Resumes by itself."""

    out: Path | None = None
    """Folder for sentences.txt.gz (for --texts), kept_rows.npz (for --text-rows, with the same
    store) and report.json; and for the store, where none is named."""
    keep: float = 0.5
    """Share of the sentences that is kept, after duplicates are gone, in (0, 1]."""
    threshold: float | None = None
    """Keep what scores this or more instead: mean cosine of the nearest images."""
    top_k: int = 5
    """Nearest images that a score is the mean of."""
    near_duplicates: float | None = None
    """Leave out sentences whose cosine with an earlier one is this or more, such as 0.97."""
    classnames: Path | None = None
    """A classnames.txt with one name a line: each in every template is a sentence, always kept."""
    templates: Path | None = None
    """A file of sentences with {c} where the name goes. Default: those beside the names."""


@dataclass(frozen=True)
class DistillOptions(CommonOptions):
    """The main job: fit, embed, distil, export, evaluate and measure a student."""

    run: RunConfig = field(default_factory=RunConfig)
    resume: bool = False
    """Go on with the run in --out, with its own settings; flags win."""
    dry_run: bool = False
    """Print the settings that the run would have, and stop."""


@dataclass(frozen=True)
class EvalOptions(EvalConfig, CommonOptions):
    """Zero-shot accuracy of teachers, runs, bundles and exported models, and what else is asked."""

    from_config: ClassVar[dict[str, str]] = {"data": "data.eval_sets"}


@dataclass(frozen=True)
class ClassifyOptions(ClassifyConfig, CommonOptions):
    """Name what image files show: a bundle's label sets, or labels of your own."""


@dataclass(frozen=True)
class ExportOptions(CommonOptions):
    """Write a run or a teacher as a bundle that needs no torch; parity is always checked."""

    from_config: ClassVar[dict[str, str]] = {
        "precision": "precision",
        "images": "data.images",
        "image_column": "data.image_column",
    }

    run: Positional[str] = ""
    """A run folder, or its checkpoint.safetensors."""
    teacher: str | None = None
    """Instead of a run: `sample`, an open_clip model (ARCHITECTURE:TAG_OR_FILE, or :random for
    its shape alone) or a folder."""
    text: bool = False
    """Put the text side of the run's teacher into the bundle: any label on the device. A run with
    a text student brings that unasked."""
    teacher_text: bool = False
    """As --text, with the teacher's even where the run has a text student."""
    image_only: bool = False
    """Leave out a teacher's text side, or a run's text student."""
    labels: tuple[str, ...] = ()
    """Label sets to bake in: labelled sets as `eval` takes them, or a classnames.txt. Default:
    those of the run."""
    out: Path | None = None
    """Folder, or archive when it ends in .zip. Default: RUN/bundle-PRECISION, or NAME-bundle
    here for a teacher."""
    format: str = "onnx"
    """What is written: onnx; tensorrt: that, and an engine built here; pt2: that, and torch's
    AOTInductor package for this device."""
    target: str | None = None
    """Device whose runtime the graph is written for: jetson-orin, raspberry-pi-5, ... Default:
    the run's; of a teacher, ONNX Runtime anywhere."""
    precision: Literal["fp32", "fp16", "int8", "fp8"] = "fp32"
    """Of the graph; int8 is as the run was trained, or else calibrated on the images; fp8 (e4m3,
    calibrated) is for targets that have it, such as jetson-agx-thor."""
    text_precision: Literal["auto", "fp32", "fp16", "int8", "int4"] = "auto"
    """Of the text side. int8 and int4 store its weights alone in integers (ONNX Runtime only);
    auto is fp16 where the images' is, else fp32."""
    calibration: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    """How far int8 reaches; auto is what the rules of the target's runtime say."""
    opset: int | None = None
    """ONNX opset. Default: what the target's runtime reads."""
    attention: str | None = None
    """packed (TensorRT); decomposed; MultiHeadAttention (ONNX Runtime); Attention (opset 23); or
    plugin: our own kernels, compiled for the target's GPU into the bundle (TensorRT 10.16 and
    newer; never run on one). Default: what the target's runtime fuses, or runs fastest."""
    batch_size: int | None = None
    """Images per call, fixed in the graph. Default: any number."""
    input: Literal["float", "uint8", "image"] = "float"
    """What the graph takes: prepared numbers (B, 3, S, S); uint8 pixels (B, S, S, 3); or an
    image of any size (B, H, W, 3), which it resizes itself."""
    head: str | None = None
    """Label set whose class scores the graph gives as well, as `logits`."""
    images: tuple[str, ...] = ()
    """Real images that parity is checked on (32), and that int8 and fp8 are calibrated on (256,
    parity on 64 of them). Parity: 1e-4 in fp32, a cosine of 0.999 in fp16 and of what was
    trained in int8, of 0.99 in calibrated int8 (0.98 for TensorRT).
    Default: those the run was distilled on, `scenes` for a teacher."""
    image_column: str = "image"
    """Column of images in Parquet files and Hugging Face data sets."""
    sentences: tuple[str, ...] = ("scenes",)
    """Real sentences that the text side's parity is checked on."""
    text_column: str = "text"
    """Column or key of sentences in .jsonl, .csv and .parquet files."""


@dataclass(frozen=True)
class BuildOptions(CommonOptions):
    """Build a bundle's TensorRT engine here, check it, and keep it in the cache."""

    bundle: Positional[str] = ""
    """A bundle: its folder or .zip."""
    precision: str | None = None
    """fp32, fp16, bf16, int8 or fp8. Default: of an fp32 bundle the precision of its target's
    budget, to which TensorRT 10 alone can lower it; else the bundle's."""
    batch: str = "1,1,8"
    """Images per call: least, usual and largest number, or one number for all."""
    workspace_mib: int | None = None
    """Most scratch memory, in MiB. Default: all of the GPU's."""
    dla_core: int | None = None
    """Deep learning accelerator to run on; what it cannot do runs on the GPU."""
    opt_level: int = 3
    """0 builds fastest, 5 tries most."""
    timing_cache: Path | None = None
    """File of kernel timings, which make builds faster. Default: this GPU's, in the cache."""
    version_compatible: bool = False
    """Let it run on later TensorRT versions with the same major number."""
    hardware_compatible: bool = False
    """Let it run on other GPUs from Ampere on; slower."""
    refit: bool = False
    """Let its weights be replaced without building again."""
    plugin_library: tuple[str, ...] = ()
    """Shared libraries of plugins; they run as code of this process."""
    data: tuple[str, ...] = ()
    """Labelled sets to measure the engine's zero-shot accuracy on."""
    profile: bool = False
    """Time each layer and list the slowest."""
    rebuild: bool = False
    """Build even if the engine is in the cache."""
    dry_run: bool = False
    """Say what NVIDIA's parser and compiler make of the bundle, without a GPU, and keep nothing:
    TensorRT for RTX is asked, for the architecture nearest to the target's."""
    out: Path | None = None
    """An .engine file to write, with a .json beside it. Default: its place in the cache."""


@dataclass(frozen=True)
class BenchOptions(BenchConfig, CommonOptions):
    """Measure models side by side on this machine, each in a process of its own, in turn."""

    models: Positional[tuple[str, ...]] = BenchConfig.models
    """MODEL or MODEL@RUNTIME. Models: bundles, runs, ONNX files, teachers (ViT-B-32:openai),
    timm:NAME, FILE.py:FUNCTION. Runtimes: onnxruntime[:PROVIDER], plain, dynamic-int8, openvino,
    eager, compile, tensorrt, aot-inductor, an .engine file. The first is what the others are
    compared to; the same may come twice."""


@dataclass(frozen=True)
class CompareOptions(CommonOptions):
    """Tell whether models became slower since an earlier bench; exit code 3 if so."""

    results: Positional[tuple[Path, ...]] = ()
    """bench.json of the earlier one, then of the later one."""
    threshold_pct: float = 5.0
    """How much slower counts."""


@dataclass(frozen=True)
class DemoOptions(DemoConfig, CommonOptions):
    """Open a page that classifies pictures, searches them and compares models, until Ctrl-C."""

    models: Positional[tuple[str, ...]] = DemoConfig.models
    """Runs, bundles and teachers. A run brings its teacher and all of its bundles. Default:
    runs/first where it is, else the sample teacher."""


@dataclass(frozen=True)
class DoctorOptions(CommonOptions):
    """Say what is installed, what works, and the command that mends the rest."""

    disk: Path = Path()
    """Folder whose free space is looked at."""


def defaults_from(kind: type[O], path: Path) -> O:
    """A command's options as a TOML file of `RunConfig` has them.

    Raises:
        ConfigError: If the file is missing or has a key or value that `RunConfig` lacks.
    """
    run = config_file.load(path, RunConfig)
    values: dict[str, Any] = {"config": path}
    if issubclass(kind, DistillOptions):
        values["run"] = run
    for flag, dotted in kind.from_config.items():
        value: Any = run
        for name in dotted.split("."):
            value = getattr(value, name)
        values[flag] = value
    return dataclasses.replace(kind(), **values)
