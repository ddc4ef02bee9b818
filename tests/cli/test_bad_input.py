"""Bad input is a feature: one line, the documented exit code, no traceback, and the old output as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphopt.cli.main import _run

Prepare = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Prepare
    code: int
    says: str


def argv(**changed: str) -> Prepare:
    return lambda folder: command(folder, **changed)


def command(folder: Path, model: str = "model.onnx", passes: str = "quant", **options: str) -> list[str]:
    words = [str(folder / model), "--passes", passes, "-o", options.pop("out", str(folder / "out"))]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", value]
    return words


def truncated(folder: Path) -> list[str]:
    data = (folder / "model.onnx").read_bytes()
    (folder / "bad.onnx").write_bytes(data[: len(data) // 2])
    return command(folder, "bad.onnx")


def text_file(folder: Path) -> list[str]:
    (folder / "bad.onnx").write_text("this is not a model\n")
    return command(folder, "bad.onnx")


def missing_external(folder: Path) -> list[str]:
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "bad.onnx", save_as_external_data=True, location="bad.data", size_threshold=0)
    (folder / "bad.data").unlink()
    return command(folder, "bad.onnx")


def short_external(folder: Path) -> list[str]:
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "bad.onnx", save_as_external_data=True, location="bad.data", size_threshold=0)
    data = (folder / "bad.data").read_bytes()
    (folder / "bad.data").write_bytes(data[: len(data) // 2])
    return command(folder, "bad.onnx")


def nan_weight(folder: Path) -> list[str]:
    model = onnx.load(folder / "model.onnx")
    weight = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 4)
    array = numpy_helper.to_array(weight).copy()
    array.flat[3] = np.nan
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, folder / "bad.onnx")
    return command(folder, "bad.onnx")


def calibration(**arrays: np.ndarray) -> Prepare:
    def prepare(folder: Path) -> list[str]:
        np.savez(folder / "bad.npz", **arrays)
        return command(folder, calibration=str(folder / "bad.npz"))

    return prepare


def text_calibration(folder: Path) -> list[str]:
    (folder / "bad.npz").write_text("no archive")
    return command(folder, calibration=str(folder / "bad.npz"))


def not_ours(folder: Path) -> list[str]:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years of work")
    return command(folder, out=str(folder / "mine"))


IMAGES = np.zeros((4, 1, 8, 8), np.float32)
CASES = [
    Case("missing file", argv(model="absent.onnx"), 2, "absent.onnx: no such file"),
    Case("a folder", argv(model="."), 2, "is a folder, not a model"),
    Case("truncated model", truncated, 2, "bad.onnx: not an ONNX model, or cut short"),
    Case("text file", text_file, 2, "bad.onnx: not an ONNX model, or cut short"),
    Case("missing external data", missing_external, 2, "its data file 'bad.data' is missing"),
    Case("short external data", short_external, 2, "its data file 'bad.data' is cut short"),
    Case("NaN weight", nan_weight, 2, "holds NaN"),
    Case("wrong names", calibration(picture=IMAGES), 2, "array 'picture' is not an input of the model"),
    Case("wrong rank", calibration(image=IMAGES[0, 0]), 2, "has rank 2, the input has rank 4"),
    Case("wrong shape", calibration(image=IMAGES[:, :, :4]), 2, "has shape 1x1x4x8, the input takes"),
    Case("wrong dtype", calibration(image=IMAGES.astype(np.float64)), 2, "is float64, the input takes float32"),
    Case("empty npz", calibration(), 2, "holds no arrays"),
    Case("no samples", calibration(image=IMAGES[:0]), 2, "holds no samples"),
    Case("damaged npz", text_calibration, 2, "not an .npz file of plain arrays, or damaged"),
    Case("missing calibration", argv(calibration="absent.npz"), 2, "absent.npz: no such file"),
    Case("missing function", argv(calibration="json:lods"), 2, "the module has no function 'lods'"),
    Case("missing module", argv(calibration="no_such_module:feeds"), 2, "module 'no_such_module' cannot be imported"),
    Case("no labels", lambda f: command(f, eval=str(f / "calib.npz")), 2, "neither labels nor reference.<output>"),
    Case("unknown metric", lambda f: command(f, eval=str(f / "eval.npz"), metric="top2"), 2, "no such metric"),
    Case("metric without data", argv(metric="top1"), 2, "needs labelled data"),
    Case("unknown pass", argv(passes="prun"), 2, "no pass called 'prun'; did you mean 'prune'?"),
    Case(
        "misspelled option", argv(passes="prune{ration=0.3}"), 2, "prune.ration: no such option; did you mean 'ratio'?"
    ),
    Case("out of range", argv(passes="prune{ratio=1.5}"), 2, "prune.ratio: 1.5 is not less than 1"),
    Case("wrong type", argv(passes="prune{ratio=much}"), 2, "prune.ratio: 'much' is not a number"),
    Case("unclosed brace", argv(passes="prune{ratio=0.3"), 2, "'{' is never closed"),
    Case("empty pipeline", argv(passes=""), 2, "expected a pass name"),
    Case("static without data", argv(passes="quant{mode=static}"), 2, "calibration"),
    Case("unknown target", argv(target="amr"), 2, "--target amr: no such target; did you mean 'arm'?"),
    Case("unknown recipe", argv(recipe="small"), 2, "cannot stand beside --passes"),
    Case("unknown command option", lambda f: [*command(f), "--calibraton", "x"], 2, "No such option"),
    Case("unknown dimension", argv(dim="bach=1"), 2, "--dim bach: no input has a dimension of that name"),
    Case("bad dimension", argv(dim="batch=0"), 2, "'0' is not a size"),
    Case("unknown shape", argv(shape="img=1x1x8x8"), 2, "--shape img: the model has no such input"),
    Case("wrong shape option", argv(shape="image=1x3x8x8"), 2, "does not fit"),
    Case("bad duration", argv(time_limit="soon"), 2, "'soon' is not a duration"),
    Case("negative limit", argv(max_drop="-1"), 2, "is not at least 0"),
    Case("unknown plugin", argv(no_plugin="acme"), 2, "no installed plugin is called 'acme'"),
    Case("output is a file", lambda f: command(f, out=str(f / "model.onnx")), 2, "is a file, not a folder"),
    Case("output not writable", lambda f: command(f, out=str(f / "model.onnx" / "x")), 2, "is a file, not a folder"),
    Case("output not ours", not_ours, 2, "exists and was not written by graphopt"),
    Case("full disk", argv(out="/dev/full/out"), 2, "/dev/full"),
]


@pytest.fixture(scope="module")
def built(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data, and a finished bundle."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("model.onnx", "calib.npz", "eval.npz"):
        shutil.copyfile(fixtures / "digits_cnn" / name, folder / name)
    assert _run(command(folder, passes="fold")) == 0
    return folder


@pytest.fixture
def workplace(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "work"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_line_and_a_code(
    case: Case, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    old = workplace / "out"
    before = {path: path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()}
    capsys.readouterr()
    code = _run(case.prepare(workplace))
    said = capsys.readouterr()
    assert (code, said.out) == (case.code, "")
    assert case.says in said.err
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("graphopt: ")
    assert {path: path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()} == before
    assert not list(workplace.glob(".*partial*")), "nothing half-written stays behind"
