"""Systems around an NPU, as `vela.ini` files describe them: clock, memories, and what lies in which memory.

A system (`[System_Config.NAME]`) says what memories are behind the two ports of the NPU and how fast they are; a memory
mode (`[Memory_Mode.NAME]`) says through which port weights, feature maps and the fast cache are reached. Vela brings a
file with the usual ones; a user's own file adds others, or replaces them by sections of the same name.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import OptionError

__all__ = ["Configuration", "Sections", "choose", "read_sections"]

Sections = Mapping[str, Mapping[str, str]]
"""Sections of ini files by name; the options of each as they are written."""

_SYSTEM, _MODE = "System_Config.", "Memory_Mode."
_FAMILY = re.compile(r"ethos[-_](u\d+)[-_]", re.IGNORECASE)
_USUAL: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "u55": ("Ethos_U55_High_End_Embedded", ("Shared_Sram", "Sram_Only")),
    "u65": ("Ethos_U65_Client_Server", ("Dedicated_Sram_384KB", "Shared_Sram", "Sram_Only")),
    "u85": ("Ethos_U85_SYS_DRAM_Mid", ("Dedicated_Sram_384KB", "Shared_Sram", "Sram_Only")),
}
"""By family: the system, and modes by preference. Systems and first modes are those that Vela takes by itself."""

_HOLDS = {
    "const_mem_area": ("dram", "onchipflash", "offchipflash"),
    "arena_mem_area": ("sram", "dram"),
    "cache_mem_area": ("sram",),
}
"""Memories in which Vela can place weights, feature maps and the cache; all three may also share one SRAM."""


@dataclass(frozen=True)
class Configuration:
    """A system and a memory mode, each by its name and with all it says, what it inherits included."""

    system: str
    mode: str
    sections: Sections

    @property
    def text(self) -> str:
        """An ini file that holds the two sections and needs no other."""
        lines: list[str] = []
        for name in (_SYSTEM + self.system, _MODE + self.mode):
            lines += [f"[{name}]", *(f"{key}={value}" for key, value in self.sections[name].items()), ""]
        return "\n".join(lines)


class _CaseKept(configparser.ConfigParser):
    """Keeps names of options as they are written, as the core of Vela may want them."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def read_sections(path: Path, subject: str) -> Sections:
    """Read an ini file.

    Raises:
        OptionError: It cannot be read, or is no ini file.
    """
    parser = _CaseKept(interpolation=None, strict=True)
    try:
        parser.read_string(path.read_text("utf8"))
    except (OSError, UnicodeDecodeError) as e:
        raise OptionError(subject, f"{str(path)!r} cannot be read", "give an .ini file as Vela takes it") from e
    except configparser.Error as e:
        fact = f"{str(path)!r} is no .ini file: {str(e).splitlines()[0]}"
        raise OptionError(subject, fact, "give one as Vela takes it") from e
    return {name: dict(parser[name]) for name in parser.sections()}


def choose(accelerator: str, system: str | None, mode: str | None, sections: Sections, subject: str) -> Configuration:
    """Pick a system and a memory mode for an NPU.

    Args:
        accelerator: Vela's name of the NPU, such as `ethos-u55-128`.
        system: Name of the system; None: a common one.
        mode: Name of the memory mode; None: the usual one that fits the system.
        sections: All that there are.
        subject: What errors call the target.

    Raises:
        OptionError: There is no such system or mode, or it does not fit; the message names those that do.
    """
    family = _family(accelerator)
    usual, modes = _USUAL.get(family, ("", ()))
    systems = [name for name in _names(sections, _SYSTEM) if _family(name) in ("", family)]
    chosen = system or usual
    if chosen not in systems:
        raise _not_one_of(f"{subject}.system_config", chosen, systems, f"for ethos-{family}")
    fitting = [name for name in _names(sections, _MODE) if _fits(sections, chosen, name)]
    picked = mode or next((name for name in modes if name in fitting), "")
    if picked not in fitting:
        raise _not_one_of(f"{subject}.memory_mode", picked, fitting, f"that fit {chosen}")
    resolved = {name: _resolved(sections, name) for name in (_SYSTEM + chosen, _MODE + picked)}
    return Configuration(chosen, picked, resolved)


def _names(sections: Sections, kind: str) -> Iterator[str]:
    return (name.removeprefix(kind) for name in sections if name.startswith(kind))


def _family(name: str) -> str:
    """Family that a name speaks of, such as `u55`; empty: none."""
    match = _FAMILY.match(name)
    return match[1].lower() if match else ""


def _not_one_of(subject: str, name: str, known: Sequence[str], which: str) -> OptionError:
    fact = f"{name!r} is not one of those {which}" if name else f"there is none of those {which}"
    return OptionError(subject, f"{fact}: {', '.join(known) or 'none'}", "give a file with others: config=FILE.ini")


def _resolved(sections: Sections, name: str) -> Mapping[str, str]:
    """Options of a section with those that it inherits; its own come before those of its parents."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    while name in sections and name not in seen:
        seen.add(name)
        found = {**{key: value for key, value in sections[name].items() if key != "inherit"}, **found}
        name = sections[name].get("inherit", "")
    return found


def _fits(sections: Sections, system: str, mode: str) -> bool:
    """Whether a mode places everything where a system has memory for it; unknown is left to Vela."""
    ports = {key.lower(): value.lower() for key, value in _resolved(sections, _SYSTEM + system).items()}
    areas = {key.lower(): value.lower() for key, value in _resolved(sections, _MODE + mode).items()}
    used = {area: ports.get(f"{areas.get(area, '')}_port") for area in _HOLDS}
    if None in used.values() or (set(used.values()) == {"sram"} and len({areas[area] for area in _HOLDS}) == 1):
        return True
    return all(used[area] in memories for area, memories in _HOLDS.items())
