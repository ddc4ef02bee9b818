"""Vela itself: what it makes, that it makes it again, and what it says when it cannot."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tosa_files import EXTRA, chain, crossed, refused_by_vela

from graphopt.errors import BackendError, ExitCode, OptionError
from graphopt_backends.npu import vela
from graphopt_backends.npu.options import NpuOptions
from graphopt_backends.npu.raw import read_raw
from graphopt_backends.npu.vela import Compiled, compile_tosa, configuration, vela_version

pytest.importorskip("ethosu.vela", reason=EXTRA)
pytest.importorskip("tosa_serializer", reason=EXTRA)

NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def network() -> bytes:
    return chain(NAMES)


@pytest.fixture(scope="module")
def made(network: bytes, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """The network compiled for a device, once."""
    folder, known = tmp_path_factory.mktemp("made"), dict[str, Compiled]()

    def compile_once(accelerator: str) -> Compiled:
        path = folder / accelerator / "model.npu0.tosa"
        if accelerator not in known:
            path.parent.mkdir()
            path.write_bytes(network)
            known[accelerator] = compile_tosa(path, accelerator, sites={"second": ("/body/Conv",)})
        return known[accelerator]

    return compile_once


@pytest.fixture
def tosa(network: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "model.npu0.tosa"
    path.write_bytes(network)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("accelerator", ["ethos-u55-128", "ethos-u65-512", "ethos-u85-256"])
def test_every_family_compiles_and_says_what_it_takes(accelerator: str, made: Callable[[str], Compiled]) -> None:
    raw_file, found = made(accelerator).raw, made(accelerator).estimate
    assert sorted(path.name for path in raw_file.parent.iterdir()) == ["model.npu0.tosa", "model.npu0_vela.npz"]
    assert (found.part, found.by) == ("model.npu0_vela.npz", f"Vela {vela_version()}")
    assert found.settings.startswith(f"{accelerator} at ")
    assert found.macs == 3 * 8 * 8 * 16 * 16 * 9
    assert [step.name for step in found.steps] == list(NAMES)
    assert found.steps[1].sites == ("/body/Conv",)
    assert found.cycles == sum(step.cycles for step in found.steps) > 0
    assert 0 < found.utilisation < 1
    raw = read_raw(raw_file)
    assert raw.commands.startswith(b"COP1")
    assert len(raw.weights) % 16 == 0
    assert len(raw.weights) >= found.encoded_bytes > 0


def test_the_output_is_the_same_again_and_anywhere(
    made: Callable[[str], Compiled], network: bytes, tmp_path: Path
) -> None:
    first = _digest(made("ethos-u55-128").raw)
    elsewhere = tmp_path / "a folder, with spaces" / "another 'name'.tosa"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(network)
    assert _digest(compile_tosa(elsewhere, "ethos-u55-128").raw) == first


def test_options_reach_vela(tosa: Path, tmp_path: Path) -> None:
    usual = compile_tosa(tosa, "ethos-u65-256").estimate
    only = compile_tosa(tosa, "ethos-u65-256", NpuOptions(memory_mode="Sram_Only")).estimate
    assert "DRAM" in usual.memory
    assert "DRAM" not in only.memory
    assert only.settings.endswith("Sram_Only")
    slow = NpuOptions(system_config="Ethos_U65_Embedded")
    assert compile_tosa(tosa, "ethos-u65-256", slow).estimate.settings.startswith("ethos-u65-256 at 500 MHz")
    mine = tmp_path / "mine.ini"
    given = configuration("ethos-u65-256", NpuOptions())
    system = given.sections["System_Config.Ethos_U65_Client_Server"] | {"core_clock": "123e6"}
    lines = (f"{key}={value}\n" for key, value in system.items())
    mine.write_text(f"[System_Config.Mine]\n{''.join(lines)}", "utf8")
    own = compile_tosa(tosa, "ethos-u65-256", NpuOptions(config=str(mine), system_config="Mine")).estimate
    assert own.settings == "ethos-u65-256 at 123 MHz, Mine, Dedicated_Sram_384KB"
    assert own.seconds == pytest.approx(own.cycles / 123e6)


def test_less_fast_memory_is_used_where_that_is_asked_for(tmp_path: Path) -> None:
    tosa = tmp_path / "model.tosa"
    tosa.write_bytes(chain(NAMES, size=32))
    fast = compile_tosa(tosa, "ethos-u55-128").estimate
    small = compile_tosa(tosa, "ethos-u55-128", NpuOptions(optimise="Size")).estimate
    assert small.memory["SRAM"] < fast.memory["SRAM"]
    tight = compile_tosa(tosa, "ethos-u55-128", NpuOptions(arena_cache_size=fast.memory["SRAM"] // 2)).estimate
    assert tight.memory["SRAM"] < fast.memory["SRAM"]


def test_inputs_and_outputs_come_in_the_order_of_the_network(tmp_path: Path) -> None:
    tosa = tmp_path / "model.tosa"
    tosa.write_bytes(crossed())
    for accelerator in ("ethos-u55-128", "ethos-u85-256"):
        raw = read_raw(compile_tosa(tosa, accelerator).raw)
        assert [place.elements for place in raw.inputs] == [64, 1024, 256]
        assert [place.elements for place in raw.outputs] == [1024, 64, 256]
        assert {place.element_bytes for place in (*raw.inputs, *raw.outputs)} == {4}
        assert raw.weights == b""


def test_what_vela_refuses_is_one_line_that_names_the_operator(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tosa = tmp_path / "model.tosa"
    tosa.write_bytes(refused_by_vela())
    with caplog.at_level(logging.DEBUG, vela.__name__), pytest.raises(BackendError) as caught:
        compile_tosa(tosa, "ethos-u55-128")
    assert caught.value.exit_code == ExitCode.BACKEND
    assert str(caught.value) == (
        "Vela: refuses model.tosa for ethos-u55-128: ReduceProduct: Unsupported operation; another device may take it, "
        "see graphopt list; -vv shows all that Vela said"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.tosa"], "nothing is left behind"
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(("content", "said"), [(b"no flatbuffer", "No networks defined"), (b"", "empty file")])
def test_a_damaged_file_is_refused_in_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    tosa = tmp_path / "model.tosa"
    tosa.write_bytes(content)
    with pytest.raises(BackendError, match=said) as caught:
        compile_tosa(tosa, "ethos-u55-128")
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_memory_that_the_npu_cannot_address_is_told_in_velas_words(tosa: Path) -> None:
    with pytest.raises(BackendError, match=r"arena_cache_size=1152921504606846976\. Size is out of bounds"):
        compile_tosa(tosa, "ethos-u55-128", NpuOptions(arena_cache_size=1 << 60))
    assert not tosa.with_name("model.npu0_vela.npz").exists()


def test_vela_is_not_waited_for_without_end(tosa: Path) -> None:
    with pytest.raises(BackendError, match=r"Vela: did not end within 0\.01 s on model\.npu0\.tosa for ethos-u55-128"):
        compile_tosa(tosa, "ethos-u55-128", seconds=0.01)
    assert [path.name for path in tosa.parent.iterdir()] == [tosa.name]


def test_a_vela_that_crashes_or_writes_nothing_is_told_in_one_line(tosa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(program: str) -> str:
        monkeypatch.setattr(vela, "_command", lambda *_: [sys.executable, "-c", program])
        with pytest.raises(BackendError) as caught:
            compile_tosa(tosa, "ethos-u55-128")
        assert [path.name for path in tosa.parent.iterdir()] == [tosa.name]
        return str(caught.value)

    assert "ended by signal 11" in run("import os; os.kill(os.getpid(), 11)")
    assert "ended with code 3" in run("raise SystemExit(3)")
    assert "only words" in run("import sys; print('only words', file=sys.stderr); sys.exit(1)")
    assert "wrote 0 files *_vela.npz where one was expected" in run("pass")


def test_names_that_the_packaged_file_lacks_are_refused_before_vela_runs(tosa: Path) -> None:
    with pytest.raises(OptionError) as caught:
        configuration("ethos-u55-128", NpuOptions(system_config="Nope"), "npu:ethos-u55-128")
    assert str(caught.value) == (
        "npu:ethos-u55-128.system_config: 'Nope' is not one of those for ethos-u55: Ethos_U55_Deep_Embedded, "
        "Ethos_U55_High_End_Embedded; give a file with others: config=FILE.ini"
    )
    for accelerator in ("ethos-u55-32", "ethos-u65-512", "ethos-u85-2048"):
        assert configuration(accelerator, NpuOptions()).mode in ("Shared_Sram", "Dedicated_Sram_384KB")


@pytest.mark.parametrize("accelerator", ["ethos-u55-128", "ethos-u65-512", "ethos-u85-256"])
def test_the_defaults_are_those_of_vela(
    accelerator: str, made: Callable[[str], Compiled], tosa: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "ethosu.vela", str(tosa), "--accelerator-config", accelerator]
    command += ["--output-format", "raw", "--output-dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert _digest(tmp_path / "model.npu0_vela.npz") == _digest(made(accelerator).raw)
