"""Systems and memory modes: what is taken by default, what fits, and what a user's file adds."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

import pytest

from graphopt.errors import ExitCode, OptionError
from graphopt_backends.npu.configurations import Sections, choose, read_sections

USUAL = """\
[System_Config.Ethos_U55_High_End_Embedded]
core_clock=500e6
axi0_port=Sram
axi1_port=OffChipFlash
[System_Config.Ethos_U65_Client_Server]
axi0_port=Sram
axi1_port=Dram
[System_Config.Ethos_U65_Embedded]
axi0_port=Sram
axi1_port=OffChipFlash
[Memory_Mode.Sram_Only]
const_mem_area=Axi0
arena_mem_area=Axi0
cache_mem_area=Axi0
[Memory_Mode.Shared_Sram]
const_mem_area=Axi1
arena_mem_area=Axi0
cache_mem_area=Axi0
[Memory_Mode.Dedicated_Sram]
const_mem_area=Axi1
arena_mem_area=Axi1
cache_mem_area=Axi0
[Memory_Mode.Dedicated_Sram_384KB]
inherit=Memory_Mode.Dedicated_Sram
arena_cache_size=393216
"""


@pytest.fixture
def sections(tmp_path: Path) -> Sections:
    return _read(tmp_path, USUAL)


def _read(folder: Path, text: str) -> Sections:
    (folder / "some.ini").write_text(text, "utf8")
    return read_sections(folder / "some.ini", "npu.config")


def _refusal(*arguments: object) -> str:
    with pytest.raises(OptionError) as caught:
        choose(*arguments, "npu:here")  # type: ignore[arg-type]
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_family_gets_its_usual_system_and_the_first_mode_that_fits(sections: Sections) -> None:
    found = choose("ethos-u55-128", None, None, sections, "npu")
    assert (found.system, found.mode) == ("Ethos_U55_High_End_Embedded", "Shared_Sram")
    found = choose("ethos-u65-256", None, None, sections, "npu")
    assert (found.system, found.mode) == ("Ethos_U65_Client_Server", "Dedicated_Sram_384KB")
    found = choose("ethos-u65-256", "Ethos_U65_Embedded", None, sections, "npu")
    assert found.mode == "Shared_Sram", "feature maps cannot lie in flash"


def test_the_file_for_vela_holds_what_sections_inherit(sections: Sections) -> None:
    parser = ConfigParser()
    parser.read_string(choose("ethos-u65-256", None, None, sections, "npu").text)
    assert parser.sections() == ["System_Config.Ethos_U65_Client_Server", "Memory_Mode.Dedicated_Sram_384KB"]
    assert dict(parser["Memory_Mode.Dedicated_Sram_384KB"]) == {
        "const_mem_area": "Axi1", "arena_mem_area": "Axi1", "cache_mem_area": "Axi0", "arena_cache_size": "393216",
    }  # fmt: skip


def test_an_unknown_name_or_one_that_does_not_fit_gets_those_that_do(sections: Sections) -> None:
    more = "; give a file with others: config=FILE.ini"
    only = f"is not one of those for ethos-u55: Ethos_U55_High_End_Embedded{more}"
    assert _refusal("ethos-u55-64", "Fast", None, sections) == f"npu:here.system_config: 'Fast' {only}"
    other = _refusal("ethos-u55-64", "Ethos_U65_Embedded", None, sections)
    assert other == f"npu:here.system_config: 'Ethos_U65_Embedded' {only}"
    fitting = f"that fit Ethos_U55_High_End_Embedded: Sram_Only, Shared_Sram{more}"
    for name in ("Dedicated_Sram", "Shared"):
        said = _refusal("ethos-u55-64", None, name, sections)
        assert said == f"npu:here.memory_mode: {name!r} is not one of those {fitting}"


def test_a_users_file_adds_systems_for_any_family_and_replaces_sections(sections: Sections, tmp_path: Path) -> None:
    mine = _read(tmp_path, "[System_Config.My_Board]\naxi0_port=Sram\naxi1_port=Dram\nDram_clock_scale=0.5\n")
    found = choose("ethos-u55-128", "My_Board", None, {**sections, **mine}, "npu")
    assert found.mode == "Shared_Sram"
    assert "Dram_clock_scale=0.5" in found.text, "the case of names stays"
    slower = _read(tmp_path, "[System_Config.Ethos_U55_High_End_Embedded]\ncore_clock=1e6\n")
    found = choose("ethos-u55-128", None, "Sram_Only", {**sections, **slower}, "npu")
    assert found.sections["System_Config.Ethos_U55_High_End_Embedded"] == {"core_clock": "1e6"}


def test_sections_that_inherit_from_each_other_end() -> None:
    sections = {
        "System_Config.Ethos_U55_High_End_Embedded": {"axi0_port": "Sram", "axi1_port": "OffChipFlash"},
        "Memory_Mode.A": {"inherit": "Memory_Mode.B", "const_mem_area": "Axi1", "arena_mem_area": "Axi0"},
        "Memory_Mode.B": {"inherit": "Memory_Mode.A", "const_mem_area": "Axi0", "cache_mem_area": "Axi0"},
    }
    found = choose("ethos-u55-128", None, "A", sections, "npu")
    assert found.sections["Memory_Mode.A"]["const_mem_area"] == "Axi1", "its own come before those of its parents"
    assert found.sections["Memory_Mode.A"]["cache_mem_area"] == "Axi0"


@pytest.mark.parametrize(
    ("content", "fact"),
    [(b"no section", "is no .ini file: File contains no section headers."), (b"\xff\xfe", "cannot be read")],
)
def test_a_file_that_is_no_ini_file_is_refused_in_one_line(content: bytes, fact: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.ini"
    path.write_bytes(content)
    with pytest.raises(OptionError) as caught:
        read_sections(path, "npu.config")
    assert str(caught.value).startswith(f"npu.config: {str(path)!r} {fact}")
    with pytest.raises(OptionError, match="cannot be read"):
        read_sections(tmp_path / "missing.ini", "npu.config")
