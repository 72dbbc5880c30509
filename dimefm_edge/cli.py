"""The command line: `dimefm-edge COMMAND ...`.

One table of commands; a command's module is imported when it runs, so that `--help` needs no
torch. With `--json`, stdout holds one JSON object and nothing else, whatever C libraries print.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.errors import DimeFMError, InputError, lookup, missing_package

if TYPE_CHECKING:
    from dimefm_edge.commands.outcome import Outcome
    from dimefm_edge.options import CommonOptions

PROG = "dimefm-edge"
_STOPPED = 130
_ENVIRONMENT = {
    errno.ENOSPC: "free some space, or name another folder",
    errno.EFBIG: "allow larger files (ulimit -f), or name another folder",
    errno.EDQUOT: "free some space, or name another folder",
    errno.EACCES: "check who owns it and its permissions, or name another folder",
    errno.EPERM: "check who owns it and its permissions, or name another folder",
    errno.EROFS: "name a folder that can be written",
    errno.ENOENT: "ls its folder: a part of the path is missing",
    errno.ENOTDIR: "name a path whose parts but the last are folders",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "name another path: there is a file where a folder should go",
}
_BAD_PATHS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_TRAIN_PACKAGES = {
    "braceexpand", "datasets", "matplotlib", "onnx", "onnxscript", "open_clip", "pyarrow",
    "safetensors", "tensorboard", "timm", "torch", "torchao", "torchvision",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One command; what it names is imported when it is called."""

    function: str
    """module:function below dimefm_edge.commands."""
    options: str
    """Class in dimefm_edge.options."""
    title: str
    stopped: str = "stopped"
    """What is said after Ctrl-C."""


COMMANDS: dict[str, Command] = {
    "targets": Command(
        "choosing:run_targets",
        "TargetsOptions",
        "list devices, power modes and budgets, and how well each is known",
    ),
    "estimate": Command(
        "choosing:run_estimate",
        "EstimateOptions",
        "latency of a student, a timm model or an ONNX file on a target, or of a table of them",
    ),
    "calibrate": Command(
        "choosing:run_calibrate",
        "CalibrateOptions",
        "measure this machine: estimates for `local` become its own",
    ),
    "fit": Command(
        "choosing:run_fit", "FitOptions", "students under a latency budget: table, plot, choice"
    ),
    "embed": Command(
        "making:run_embed",
        "EmbedOptions",
        "teacher embeddings into a store, resumable shard by shard",
        "stopped; run the same command to go on",
    ),
    "corpus": Command(
        "making:run_corpus",
        "CorpusOptions",
        "keep the sentences that the teacher finds near to images of a pool",
        "stopped; run the same command to go on",
    ),
    "distill": Command(
        "making:run_distill",
        "DistillOptions",
        "the main job: all of it, up to the bundle and the report",
        "stopped; run the same command with --resume to go on",
    ),
    "eval": Command(
        "evaluating:run_eval",
        "EvalOptions",
        "accuracy of models: zero-shot, linear probe, retrieval, robustness, calibration",
    ),
    "export": Command(
        "exporting:run_export",
        "ExportOptions",
        "a run or a teacher to a bundle: fp32, fp16, int8 or fp8, parity checked",
    ),
    "classify": Command(
        "classifying:run_classify",
        "ClassifyOptions",
        "name what image files show, with a bundle: any labels, a table, JSON or CSV",
    ),
    "build": Command(
        "building:run_build",
        "BuildOptions",
        "a bundle to a TensorRT engine, on the device that will run it",
    ),
    "bench": Command(
        "benching:run_bench",
        "BenchOptions",
        "models side by side on this machine: latency, ratios, memory, stages, a report",
    ),
    "bench compare": Command(
        "benching:run_compare", "CompareOptions", "has a model become slower since an earlier bench"
    ),
    "demo": Command(
        "showing:run_demo", "DemoOptions", "a page that shows a student beside its teacher"
    ),
    "doctor": Command(
        "judging:run_doctor",
        "DoctorOptions",
        "what is installed, what works, and the command that mends the rest",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Without the program's name; default: what the user typed.

    Returns:
        0 done, 1 failed, 2 bad usage or input, 3 budget or parity not met, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(words)
    except BrokenPipeError:  # `| head`: the reader has what it wanted
        _to_nowhere()
        return 0


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        _print(_usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from dimefm_edge import __version__

        _print(f"{PROG} {__version__}")
        return 0
    is_json = "--json" in words
    try:
        with _stdout_on_stderr() if is_json else contextlib.nullcontext():
            outcome = _run(words)
    except SystemExit as done:  # a command's --help
        return done.code if isinstance(done.code, int) else 1
    except KeyboardInterrupt:
        command = COMMANDS.get(_split(words)[0])
        return _fail(command.stopped if command else "stopped", None, _STOPPED, is_json)
    except Exception as error:
        known = _as_known(error)
        if known is None:
            logging.getLogger(__name__).exception("this is a bug of %s, please report it", PROG)
            return _fail(f"{type(error).__name__}: {error}", None, 1, is_json, is_shown=True)
        return _fail(str(known.args[0]), known.hint, known.exit_code, is_json)
    if outcome is None:  # a rank of torchrun other than 0
        return 0
    try:
        _print_outcome(outcome, is_json)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, say: what was asked is done all the same
        print(f"error: stdout cannot be written to: {error.strerror}", file=sys.stderr)
        _to_nowhere()
        return outcome.exit_code or 1
    return outcome.exit_code


def _to_nowhere() -> None:
    """Whatever is left for stdout: the interpreter would complain of it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The command, of one word or two, and its flags."""
    size = 2 if " ".join(words[:2]) in COMMANDS else 1
    return " ".join(words[:size]), words[size:]


def _run(words: list[str]) -> Outcome | None:
    name, flags = _split(words)
    command = lookup(COMMANDS, name, kind="command")
    options = parse_options(name, flags)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if not options.verbose and not sys.warnoptions:
        warnings.simplefilter("ignore")
    module, _, name = command.function.partition(":")
    outcome: Outcome | None = getattr(
        importlib.import_module(f"dimefm_edge.commands.{module}"), name
    )(options)
    return outcome


# ------------------------------------------------------------------------------ flags


def parse_options(name: str, words: Sequence[str]) -> CommonOptions:
    """Turn a command's flags into its options; `--config` gives what flags leave out.

    Raises:
        InputError: If a flag or its value is wrong; the message offers the nearest.
        SystemExit: After `--help` was printed.
    """
    from dimefm_edge import options as options_module
    from dimefm_edge.config import RUN_FILE
    from dimefm_edge.files import run_folder
    from dimefm_edge.options import DistillOptions, FitOptions, defaults_from

    kind: type[CommonOptions] = getattr(options_module, COMMANDS[name].options)
    parsed = _parse(name, words, kind())
    source = parsed.config
    if isinstance(parsed, DistillOptions) and parsed.resume and source is None:
        saved = Path(parsed.run.out) / RUN_FILE
        source = saved if saved.is_file() else None
    if isinstance(parsed, FitOptions) and parsed.elastic and source is None:
        saved = run_folder(parsed.elastic) / RUN_FILE
        source = saved if saved.is_file() else None
    if source is None:
        return parsed
    defaults = defaults_from(kind, source)
    if isinstance(defaults, FitOptions) and parsed.config is None:  # limits of the run's largest
        defaults = dataclasses.replace(defaults, latency_ms=None, max_memory_mib=None)
    return _parse(name, words, defaults)


_MENDS = {"'int8' for argument '--precision'": "--qat int8, or --ptq int8"}
"""What to type instead, where a complaint about flags tells what was meant."""


def _parse(name: str, words: Sequence[str], default: CommonOptions) -> CommonOptions:
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: CommonOptions = tyro.cli(
                type(default),
                prog=f"{PROG} {name}",
                args=list(words),
                default=default,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
            return parsed
    except SystemExit as done:
        if not done.code:
            raise
        message = _first_lines(said.getvalue())
        hint = next((mend for told, mend in _MENDS.items() if told in message), None)
        raise InputError(message, hint=hint or f"{PROG} {name} --help") from None


def _first_lines(box: str) -> str:
    """What tyro's box says, in one line: the complaint, then the flags that were meant.

    The box is a title, then sections between rules, drawn in whatever the terminal can.
    """
    lines = [line.strip("│╭╮╰╯|+ ") for line in box.splitlines()]
    lines = [line for line in lines if line][1:]
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.strip("─-"):
            sections[-1].append(line)
        else:
            sections.append([])
    sections = [section for section in sections if section] or [["these flags cannot be read"]]
    message = " ".join(sections[0])
    meant = [line.split()[0] for s in sections[1:] for line in s if line.startswith("--")]
    if message.startswith("Unrecognized") and meant:
        message += f". Did you mean {' or '.join(dict.fromkeys(meant))}?"
    return message


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [flags]",
            "",
            "Distil a big CLIP-like model into a small one that fits an edge device.",
            "",
            *(f"  {name:{width}}  {command.title}" for name, command in COMMANDS.items()),
            "",
            f"{PROG} COMMAND --help tells its flags. Every command takes --json, --config",
            "run.toml and --verbose. Exit codes: 0 done, 1 failed, 2 bad usage or input,",
            "3 budget or parity not met.",
            "",
            "The main job, offline, with the sample teacher:",
            "",
            f"  {PROG} distill --target jetson-orin --out runs/first",
        ]
    )


# ----------------------------------------------------------------------------- output


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Send file descriptor 1 and `sys.stdout` to stderr: C libraries print there too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # None: it is closed
        sys.stdout.flush()
    try:
        saved = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # no stdout, or no stderr
        saved = -1
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if saved >= 0:
            os.dup2(saved, 1)
            os.close(saved)


def _print_outcome(outcome: Outcome, is_json: bool) -> None:
    if is_json:
        _print(json.dumps(_finite(outcome.values), indent=2, default=str, allow_nan=False))
    elif outcome.is_markdown and sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(outcome.text))
    else:
        _print(outcome.text)


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _print(text: str) -> None:
    print(text, flush=True)


def _fail(
    message: str, hint: str | None, exit_code: int, is_json: bool, *, is_shown: bool = False
) -> int:
    if not is_shown:
        print(f"error: {message}" + (f"\n  try: {hint}" if hint else ""), file=sys.stderr)
    if is_json and os.environ.get("RANK", "0") == "0":  # of torchrun's processes one tells
        try:
            _print(json.dumps({"error": message, "hint": hint, "exit_code": exit_code}, indent=2))
        except OSError:  # the error was told on stderr
            _to_nowhere()
    return exit_code


def _as_known(error: Exception) -> DimeFMError | None:
    """What the user can mend, as an error of ours; None for a bug."""
    if isinstance(error, DimeFMError):
        return error
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        where = f": {error.filename}" if error.filename else ""
        logging.getLogger(__name__).info("where it was met", exc_info=error)  # --verbose
        kind = InputError if error.errno in _BAD_PATHS else DimeFMError
        return kind(f"{os.strerror(error.errno)}{where}", hint=_ENVIRONMENT[error.errno])
    if isinstance(error, ModuleNotFoundError):
        is_ours = (error.name or "").partition(".")[0] in _TRAIN_PACKAGES
        return missing_package(error) if is_ours else None
    return None
