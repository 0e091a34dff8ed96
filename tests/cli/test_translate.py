"""Command lines of the published programs, in fields of this library."""

import pathlib
import shlex

import pytest

from mosaic_jax.cli import list as list_command
from mosaic_jax.cli import run, translate, translations
from mosaic_jax.core import errors
from mosaic_jax.run import settings

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "translating.md"
# What the published README gives to both of Mosaic's programs.
COMMON = (
    "--data_set CIFAR-10 --I 10 --batch_size 64 --eval_step_interval 5"
    " --eval_batch_size 256 --lr_lm 0.01 --weight_decay 1e-4 --data_partition_mode"
    " non_iid_dirichlet_unbalanced --non_iid_alpha {alpha} --client_num 10"
    " --selected_client_num 10 --device cuda --seed 0 --imageSize 32"
    " --outf GANs_CIFAR-10_0.01 --niter 200"
)
INIT = f"python main_init.py --comm_round 300 --app_name FedInit {COMMON}"
MOSAIC = (
    f"python main_mosaic.py --comm_round 80 --app_name Mosaic {COMMON} --teacher_init"
    " --meta_epochs {epochs} --KD_epochs {steps} --warmup_epochs 40"
)
DEFAULTS = {name: flag.default for name, flag in translations.FLAGS.items()}


def command(*lines):
    """The words of the command that is printed, without the comments."""
    printed = translate.translated(lines).splitlines()
    kept = [line for line in printed if not line.startswith("#")]
    return shlex.split(" ".join(kept).replace("\\", ""))


def study_of(*lines):
    """Settings of the study that the printed command runs."""
    words = command(*lines)
    assert words[:2] == ["mosaic", "run"]
    return settings.from_mapping(run.parse(words[2:]).config.to_dict())


@pytest.mark.parametrize(
    ("alpha", "epochs", "steps", "variant"),
    [
        ("0.01", 30, 1500, "published"),
        ("0.1", 50, 2500, "published_0.1"),
        ("1.0", 50, 2500, "published_1.0"),
    ],
)
def test_the_published_commands_are_the_published_configurations(
    alpha, epochs, steps, variant
):
    lines = [
        line.format(alpha=alpha, epochs=epochs, steps=steps) for line in (INIT, MOSAIC)
    ]
    expected = ["mosaic", "run", "--config", f"cifar10_mosaic:{variant}"]
    assert command(*lines) == command(*lines[::-1]) == command(lines[1]) == expected


def test_cifar100_by_hand():
    study = study_of(
        "main_init.py --data_set CIFAR-100 --comm_round 1000 --I 20 --niter 200",
        "main_mosaic.py --data_set cifar100 --comm_round 60 --warmup_epochs 19 --I 20"
        " --cluster_k 60 --meta_epochs 7 --KD_epochs=11",
    )
    assert (study.data.name, study.prototypes.clusters) == ("cifar100", 60)
    rounds = study.init.rounds, study.warmup.rounds, study.finetune.rounds
    assert rounds == (1000, 20, 40)
    assert (study.meta.steps, study.distill.steps) == (35, 11)
    # The published defaults of what is not given.
    assert study.local.batch_size == study.generators.batch_size == 256
    assert study.local.weight_decay == 0


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "fedbn", "fedrs"])
def test_baselines_by_hand(method):
    study = study_of(
        f"main_{method}.py --comm_round 300 --I 10 --selected_client_num 5 --seed 3"
        " --data_partition_mode iid --lr_lm 0.1"
    )
    assert (study.method, study.init.method) == ("federated", method)
    assert study.total_rounds == study.init.rounds == 300
    assert (study.init.clients_per_round, study.seed) == (5, 3)
    assert (study.data.split, study.local.learning_rate) == ("iid", 0.1)


def test_every_flag_has_its_row():
    assert translations.table() in DOCUMENT.read_text()


def test_every_flag_names_fields_there_are():
    known = {name for name, _, _ in list_command.fields()}
    for name, flag in translations.FLAGS.items():
        assert set(flag.fields) <= known, name
        assert flag.fields or flag.note, name


@pytest.mark.parametrize("program", translations.PROGRAMS)
def test_every_flag_is_taken_and_sets_its_fields_or_is_told(program):
    flags = translations.flags_of(program)
    plain = translate.translated([program])
    for name, flag in flags.items():
        value = "" if isinstance(flag.default, bool) else flag.default or "1"
        printed = translate.translated([f"{program} --{name} {value}".strip()])
        counts = [one for one in flag.fields if translations.counts(program, one)]
        assert (f"# --{name}" in printed) != bool(counts), name
        by_default = f"--{name} {flag.default}"
        assert (by_default in plain) == bool(counts), name


@pytest.mark.parametrize(
    ("name", "text", "field"),
    [
        ("I", "3", "local.steps"),
        ("eval_batch_size", "7", "evaluation.batch_size"),
        ("client_num", "20", "data.num_clients"),
        ("nz", "50", "generators.latent_dim"),
        ("niter", "9", "generators.epochs"),
        ("lr", "0.5", "generators.learning_rate"),
    ],
)
def test_a_value_arrives(name, text, field):
    _, given = translate.parsed(f"main_init.py --{name} {text}")
    found = translations.fields_of("main_init.py", DEFAULTS | given)
    assert found[field] == float(text)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["main_mosaic.py --meta_epoch 3"], "--meta_epoch: unknown flag, did you mean"),
        (["main_fedavg.py --KD_epochs 3"], "main_fedavg.py --KD_epochs: unknown flag"),
        (["main_mosaic.py 3"], "main_mosaic.py 3: unknown flag"),
        (["main.py"], "mosaic translate: 'main.py': unknown program, "),
        ([""], "mosaic translate: '': unknown program, "),
        (["main_init.py '"], "mosaic translate: No closing quotation"),
        (["main_init.py --I x"], "--I = 'x': must be a whole number"),
        (["main_init.py --lr x"], "--lr = 'x': must be a number"),
        (["main_init.py --outf"], "--outf = None: must be given"),
        (["main_init.py --data_set SVHN"], "--data_set = 'SVHN': must be CIFAR-10, "),
        (["main_init.py --I 0"], "local.steps = 0: must be >= 1"),
        (
            ["main_mosaic.py --comm_round 9"],
            "--comm_round = 9: must be > --warmup_epochs = 40",
        ),
        (["main_init.py", "main_init.py"], "must be one, or one of main_init.py and"),
        (["main_init.py", "main_fedavg.py"], "must be one, or one of main_init.py and"),
        (
            ["main_init.py --I 3", "main_mosaic.py --I 4"],
            "local.steps = 4 by main_mosaic.py: must be 3, as the other line has it",
        ),
    ],
)
def test_wrong_lines_are_told_in_one_line(lines, told, capsys):
    assert translate.main(lines) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1


def test_what_is_printed(capsys):
    assert translate.main(["main_init.py --device cpu --outf x"]) == 0
    first, second, third, *command = capsys.readouterr().out.splitlines()
    assert first.startswith("# --device cpu: devices are found")
    assert second.startswith("# --outf x: generators lie in the run directory")
    assert third.startswith(
        "# main_init.py has by default: --data_set CIFAR-10, --comm"
    )
    assert command[0] == "mosaic run --config cifar10_mosaic:published \\"


def test_errors_are_config_errors():
    with pytest.raises(errors.ConfigError):
        translate.translated(["main_init.py --nope"])
