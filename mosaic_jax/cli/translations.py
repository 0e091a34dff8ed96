"""The flags of Mosaic's published programs, and the fields that have their place here.

Facts of the command lines of github.com/Wings-Of-Disaster/Mosaic: names and defaults of
`param_config.py`, which its programs share.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mosaic_jax.core import errors

# Numbers of Adam's steps in one of its meta epochs.
META_EPOCH = 5
MOSAIC, INIT = "main_mosaic.py", "main_init.py"
# Programs and the methods that they run.
PROGRAMS: Mapping[str, str] = {
    INIT: "mosaic",
    MOSAIC: "mosaic",
    "main_fedavg.py": "fedavg",
    "main_fedprox.py": "fedprox",
    "main_fedbn.py": "fedbn",
    "main_fedrs.py": "fedrs",
}
DATA_SETS = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
SPLITS = {
    "iid": "iid",
    "non_iid_dirichlet_unbalanced": "dirichlet_unbalanced",
    "non_iid_dirichlet_balanced": "dirichlet_balanced",
}

# All values of a command line by flag.
Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the published programs.

    Attributes:
      default: its value there where it is not given; a bool: it takes no value.
      fields: names of the fields that it sets here; (): it has no counterpart.
      of: from all values to those of `fields`, in their order.
      note: how the value is turned, or what there is in its place.
      choices: the values that it may have; (): any.
      programs: those that have it; (): all.
    """

    default: Any
    fields: tuple[str, ...] = ()
    of: Callable[[Values], tuple[Any, ...]] = lambda values: ()
    note: str = ""
    choices: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()


def _same(name: str, default: Any, *fields: str, note: str = "") -> Flag:
    """A flag whose value that of `fields` is."""
    return Flag(default, fields, lambda values: (values[name],) * len(fields), note)


def _unused(default: Any, note: str) -> Flag:
    return Flag(default, note=note)


def _participants(values: Values) -> int:
    number = values["selected_client_num"]
    return 0 if number == values["client_num"] else number


_DREAMS = "of an inversion of images that no program runs"
_BOTH = (INIT, MOSAIC)
FLAGS: Mapping[str, Flag] = {
    "data_set": Flag(
        "CIFAR-10",
        ("data.name",),
        lambda values: (DATA_SETS[values["data_set"]],),
        choices=tuple(DATA_SETS),
    ),
    "comm_round": Flag(
        100,
        ("init.rounds", "warmup.rounds", "finetune.rounds"),
        note=f"of {INIT} the first; of {MOSAIC} --warmup_epochs + 1 of warm-up, the"
        " rest for fine-tuning; of the others the first, and no further ones",
    ),
    "I": _same("I", 20, "local.steps"),
    "batch_size": _same("batch_size", 256, "local.batch_size", "generators.batch_size"),
    "eval_step_interval": _unused(5, "no program reads it: each round is evaluated"),
    "eval_batch_size": _same("eval_batch_size", 256, "evaluation.batch_size"),
    "lr_lm": _same("lr_lm", 0.01, "local.learning_rate"),
    "weight_decay": _same("weight_decay", 0.0, "local.weight_decay"),
    "model_type": _unused("ResNet_18", "no program reads it: all train ResNet-18"),
    "data_partition_mode": Flag(
        "non_iid_dirichlet_unbalanced",
        ("data.split",),
        lambda values: (SPLITS[values["data_partition_mode"]],),
        choices=tuple(SPLITS),
    ),
    "non_iid_alpha": _same("non_iid_alpha", 0.01, "data.alpha"),
    "client_num": _same("client_num", 10, "data.num_clients"),
    "selected_client_num": Flag(
        10,
        ("init.clients_per_round",),
        lambda values: (_participants(values),),
        "0 where all take part",
    ),
    "device": _unused("cuda", "devices are found; JAX_PLATFORMS=cpu takes the CPU"),
    "seed": _same("seed", 0, "seed", note="the split has seed + data.split_seed"),
    "log_level": _unused("INFO", "the log is always that of INFO"),
    "app_name": _unused("FedInversion", "--workdir names a run"),
    "teacher_init": _unused(
        False, f"the models of {INIT}: a study begins with its stage init"
    ),
    "meta_epochs": Flag(
        30,
        ("meta.steps",),
        lambda values: (META_EPOCH * values["meta_epochs"],),
        f"{META_EPOCH} steps each",
        programs=_BOTH,
    ),
    "KD_epochs": Flag(
        1500,
        ("distill.steps",),
        lambda values: (values["KD_epochs"],),
        "a step each",
        programs=_BOTH,
    ),
    "cluster_k": Flag(
        10,
        ("prototypes.clusters",),
        lambda values: (values["cluster_k"],),
        programs=_BOTH,
    ),
    "warmup_epochs": Flag(
        40,
        ("warmup.rounds", "finetune.rounds"),
        note="see --comm_round",
        programs=_BOTH,
    ),
    "iters_mi": _unused(2000, _DREAMS),
    "cig_scale": _unused(0.0, _DREAMS),
    "di_lr": _unused(0.1, _DREAMS),
    "di_var_scale": _unused(2.5e-5, _DREAMS),
    "di_l2_scale": _unused(3e-8, _DREAMS),
    "r_feature_weight": _unused(100.0, _DREAMS),
    "exp_descr": _unused("try1", "--workdir names a run"),
    "workers": _unused(2, "images lie on the device"),
    "imageSize": _unused(32, "the data set's: 32 for both"),
    "nz": _same("nz", 100, "generators.latent_dim"),
    "ngf": _unused(64, "no program reads it: 64, generators.width"),
    "ndf": _unused(64, "no program reads it: 64, generators.width"),
    "niter": _same("niter", 25, "generators.epochs"),
    "lr": _same("lr", 0.0002, "generators.learning_rate"),
    "beta1": _unused(0.5, "fixed at 0.5"),
    "ngpu": _unused(1, "compute.devices says how many are used; all, by default"),
    "netG": _unused("", "a run goes on by itself"),
    "netD": _unused("", "a run goes on by itself"),
    "outf": _unused(".", "generators lie in the run directory, --workdir"),
    "label": _unused(0, "no program reads it"),
}
# Groups of fields that a program's line says nothing of: another one trains these.
_OTHERS: Mapping[str, tuple[str, ...]] = {
    INIT: ("warmup", "prototypes", "meta", "distill", "finetune"),
    MOSAIC: ("generators",),
}
_NO_MOSAIC = ("generators", "prototypes", "meta", "distill")


def flags_of(program: str) -> dict[str, Flag]:
    """The flags of a program by name."""
    return {
        name: flag
        for name, flag in FLAGS.items()
        if not flag.programs or program in flag.programs
    }


def counts(program: str, field: str) -> bool:
    """Whether a field is one that `program` has a say in."""
    return field.partition(".")[0] not in _OTHERS.get(program, _NO_MOSAIC)


def fields_of(program: str, values: Values) -> dict[str, Any]:
    """The fields that a command line sets here.

    Args:
      program: one of `PROGRAMS`.
      values: of all flags of the program.

    Returns:
      Values by dotted name.
    """
    result = _rounds(program, values)
    for flag in flags_of(program).values():
        for field, value in zip(flag.fields, flag.of(values), strict=False):
            if counts(program, field):
                result[field] = value
    return result


def _rounds(program: str, values: Values) -> dict[str, int]:
    """How the rounds of a program are dealt to stages."""
    rounds = values["comm_round"]
    if program == INIT:
        return {"init.rounds": rounds}
    if program == MOSAIC:
        # Distillation follows the round of this number, counted from 0.
        warmup = values["warmup_epochs"] + 1
        if rounds < warmup:
            raise errors.ConfigError(
                f"--comm_round = {rounds}: must be > --warmup_epochs = {warmup - 1}"
            )
        return {"warmup.rounds": warmup, "finetune.rounds": rounds - warmup}
    return {"init.rounds": rounds, "warmup.rounds": 0, "finetune.rounds": 0}


def table() -> str:
    """All flags as a table in Markdown, for docs/translating.md."""
    lines = ["| flag | default there | field here | |", "|---|---|---|---|"]
    for name, flag in FLAGS.items():
        fields = ", ".join(f"`{field}`" for field in flag.fields) or "-"
        default = "" if flag.default in ("", False) else f"{flag.default}"
        lines.append(f"| `--{name}` | {default} | {fields} | {flag.note} |")
    return "\n".join(lines)
