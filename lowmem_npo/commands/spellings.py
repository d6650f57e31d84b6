"""How options may be written: by other tools' names, as switches, with several files after one of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lowmem_npo.config import TILE_ROWS
from lowmem_npo.errors import UserError

ACCUMULATION = "--gradient-accumulation-steps"
TRL_ROWS = "per-device-train-batch-size"  # of which a step has --gradient-accumulation-steps, by default one
# Names that users know, as from TRL and transformers, and ours.
ALIASES = {
    "model-name-or-path": "model",
    "model-revision": "revision",
    "load-in-4bit": "qlora",
    "attn-implementation": "attn",
    "torch-dtype": "dtype",
    "learning-rate": "lr",
    "num-train-epochs": "epochs",
    TRL_ROWS: "micro-batch-size",
    "lora-target-modules": "lora-targets",
    "lora-modules-to-save": "modules-to-save",
    "resume-from-checkpoint": "resume",
    "max-seq-length": "max-length",
    "activation-checkpointing": "gradient-checkpointing",
    "budget": "memory-budget",
    "prompt-template": "template",
}
SOURCES = ("--forget", "--retain", "--holdout", "--members", "--nonmembers")  # which take several files
# The value of a flag that is given without one.
WITHOUT_VALUE = {"--tile-mlp": str(TILE_ROWS), "--gradient-checkpointing": "on", "--double-quant": "on"}
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")
NONE = ("none", "null", "off", "no", "false")  # of a number that may be left out
AUTOMATIC = ("--gradient-checkpointing", "--double-quant")  # auto, on or off; also spelled as switches are


def canonical(arguments: Sequence[str]) -> list[str]:
    """--some_flag=x becomes --some-flag x, and aliases become our names."""
    result: list[str] = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("_", "-")
            name = name if name == TRL_ROWS else ALIASES.get(name, name)
            result += [f"--{name}", value] if equals else [f"--{name}"]
        else:
            result.append(argument)
    return result


def plain_switches(arguments: Sequence[str], switches: Collection[str], flags: Collection[str]) -> list[str]:
    """`--qlora true` becomes --qlora, `--qlora=no` --no-qlora, `--no-double-quant` --double-quant off, and a flag of
    `WITHOUT_VALUE` gets its value. flags: those that there are; switches: those of them that take no value."""
    automatic, alone = ({*those} & {*flags} for those in (AUTOMATIC, WITHOUT_VALUE))
    opposite = {f"--no-{flag[2:]}": flag for flag in automatic}
    parted: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if (ours := flag.replace("_", "-")) in {*switches, *automatic, *alone, *opposite}:
            parted += [ours, value] if equals else [ours]
        else:
            parted.append(argument)
    result: list[str] = []
    for argument in parted:
        last, said = result[-1] if result else "", argument.lower()
        if last in switches and said in TRUE + FALSE:
            result[-1] = last if said in TRUE else f"--no-{last[2:]}"
        elif last in automatic and said in TRUE + FALSE:
            result.append("on" if said in TRUE else "off")
        elif argument in opposite:
            result += [opposite[argument], "off"]
        else:
            result.append(argument)
    for at in range(len(result) - 1, -1, -1):
        if result[at] in alone and (at + 1 == len(result) or result[at + 1].startswith("--")):
            result.insert(at + 1, WITHOUT_VALUE[result[at]])
    return result


def our_names(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """The arguments, with our names for aliases of these flags."""
    ours = {f"--{alias}": f"--{name}" for alias, name in ALIASES.items() if f"--{name}" in flags}
    parted = (argument.partition("=") for argument in arguments)
    return [ours.get(flag.replace("_", "-"), flag) + equals + value for flag, equals, value in parted]


def as_in_trl(flags: Sequence[str]) -> tuple[list[str], str | None]:
    """The flags with ours for --per-device-train-batch-size, and its value: a step has as many rows on each device for
    each of --gradient-accumulation-steps, one where nothing says otherwise. --micro-batch-size beside it decides how
    many of them go through the model at once."""
    flags, rows, ours = list(flags), f"--{TRL_ROWS}", f"--{ALIASES[TRL_ROWS]}"
    values = []
    while rows in flags[:-1]:
        at = flags.index(rows)
        values.append(flags[at + 1])
        del flags[at : at + 2]
    if not values:
        return [ours if flag == rows else flag for flag in flags], None  # which lacks its value
    flags += [] if ours in flags else [ours, values[-1]]
    flags += [] if {ACCUMULATION, "--batch-size"} & {*flags} else [ACCUMULATION, "1"]
    return flags, values[-1]


def run_first(arguments: Sequence[str]) -> list[str]:
    """`--adapter DIR`, as other commands name a run, becomes DIR before all else, for those that know it by its place.

    Raises:
        UserError: it lacks its value.
    """
    flags = [argument.partition("=")[0] for argument in arguments]
    if "--adapter" not in flags:
        return list(arguments)
    at = flags.index("--adapter")
    before, (given, *after) = arguments[:at], arguments[at:]
    if "=" in given:
        return [given.partition("=")[2], *before, *after]
    if not after or after[0].startswith("--"):
        raise UserError("--adapter needs a value: the directory of a run or of an adapter.")
    return [after[0], *before, *after[1:]]


def with_none(arguments: Sequence[str], optional: Collection[str]) -> list[str]:
    """`--layered none` becomes --layered None. optional: the flags of numbers that may be left out."""
    result: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if equals and flag in optional and value.lower() in NONE:
            result.append(f"{flag}=None")
        else:
            left_out = result and result[-1] in optional and argument.lower() in NONE
            result.append("None" if left_out else argument)
    return result


def join_sources(arguments: Sequence[str]) -> list[str]:
    """`--forget a.txt b.txt`, which a shell makes of `--forget *.txt`, becomes `--forget a.txt,b.txt`."""
    result: list[str] = []
    for argument in arguments:
        value = not argument.startswith("--")
        if value and len(result) > 1 and result[-2] in SOURCES and not result[-1].startswith("--"):
            result[-1] += f",{argument}"
        else:
            result.append(argument)
    return result
