"""Every field of a study, with its default and what it does.

The defaults are the method of `docs/methods.md`; sizes are those of the published
CIFAR-10 study (10 clients, ResNet-18, 300 + 80 rounds).
"""

from ml_collections import config_dict

from mosaic_jax import methods


def get_config() -> config_dict.ConfigDict:
    """The defaults; other configs start from them."""
    config = config_dict.ConfigDict()
    config.method = "mosaic"  # mosaic, or federated: rounds of init.method only
    config.profile = ""  # a stage: trace a chunk of its steps, for Perfetto
    config.compare = ""  # methods by comma, all, heterogeneous: each on equal terms
    config.seeds = 1  # studies with seeds seed, seed + 1, ...: mean and spread
    config.seed = 0  # of everything; the split is drawn from seed + data.split_seed

    config.data = data = config_dict.ConfigDict()
    # digits, mnist, fashion_mnist, svhn, cifar10, cifar100, tiny_imagenet, food101;
    # or your own: folder (of class sub-folders of images), npz
    data.name = "cifar10"
    data.dir = "data"  # archives are looked for, downloaded and cached here
    data.augmentation = "auto"  # of the data set; or none, crop_flip
    data.split = "dirichlet_unbalanced"  # or dirichlet_balanced, iid, file
    data.split_file = ""  # JSON like a run's split.json, or CSV: client, index
    data.num_clients = 10
    data.alpha = 0.01  # Dirichlet concentration; smaller: clients differ more
    data.split_seed = 5363  # with seed 0: the published CIFAR-10 split
    data.max_images = 0  # > 0: train on a random subset of this size
    data.validation = 0.0  # share of the training images that no client gets

    config.model = model = config_dict.ConfigDict()
    model.name = "resnet18"  # resnet18, 34, 50, 101, 152 with a CIFAR stem; or cnn
    model.others = ()  # further networks, dealt to the clients in turn with `name`
    model.width = 64  # channels of the first group
    model.norm = "batch"  # or group, which keeps no statistics
    model.dtype = "float32"  # of activations; or bfloat16. Parameters are float32
    model.rate = 1.0  # share of the channels of every hidden layer

    config.local = local = config_dict.ConfigDict()
    local.steps = 10  # minibatches per client and round
    local.batch_size = 64
    local.learning_rate = 0.01  # plain SGD
    local.weight_decay = 1e-4  # L2 on every parameter

    config.init = init = config_dict.ConfigDict()
    init.method = "fedavg"  # federated algorithm of every round in the study
    init.rounds = 300
    init.clients_per_round = 0  # drawn anew each round, of all rounds; 0: everyone

    # What part of the network a client holds, for heterofl, fedrolex and feddropout.
    config.budgets = budgets = config_dict.ConfigDict()
    budgets.rule = "list"  # rates in turn; or shares, formula
    budgets.rates = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of every layer's channels
    budgets.shares = (0.2, 0.2, 0.2, 0.2, 0.2)  # of the clients, for rule shares
    budgets.rho = 5.0  # rule formula: client i of N holds 2^-min(sigma, rho i / N)
    budgets.sigma = 4

    config.server = server = config_dict.ConfigDict()
    server.method = (
        "none"  # or dense, fedftg, dfrd: trains the global model without data
    )
    server.when = "every_round"  # or once, after the rounds, from the clients' models
    server.batch_norm = "eval"  # of the student: the clients' statistics; or train
    server.rounds = 200  # of once: epochs of dense, rounds of the others
    server.participants = "all"  # or latest: of once, as experts.participants

    # Fields of each init.method and server.method: see its file and docs/methods.md.
    config.methods = fields = config_dict.ConfigDict()
    fields.fedprox = config_dict.ConfigDict({"mu": 0.01})
    fields.fedrs = config_dict.ConfigDict(
        {"alpha": 0.5, "mode": "binary", "growth": 0.0, "cap": 1.0}
    )
    for name in ("heterofl", "fedrolex", "feddropout"):
        fields[name] = config_dict.ConfigDict(
            {
                "batch_norm": "static",
                "scaler": True,
                "weighting": "size",
                "masked_loss": False,
            }
        )
    fields.feddyn = config_dict.ConfigDict({"alpha": 0.01})
    fields.dense = config_dict.ConfigDict(
        {
            "generator_steps": 30,
            "batch_size": 256,
            "pool": 200,
            "latent_dim": 256,
            "width": 64,
            "generator_learning_rate": 1e-3,
            "student_learning_rate": 0.005,
            "momentum": 0.9,
            "class_weight": 1.0,
            "statistics_weight": 1.0,
            "boundary_weight": 0.5,
            "temperature": 20.0,
        }
    )
    fields.fedftg = config_dict.ConfigDict(
        {
            "iterations": 10,
            "student_steps": 5,
            "batch_size": 64,
            "latent_dim": 100,
            "width": 64,
            "generator_learning_rate": 0.01,
            "student_learning_rate": 0.01,
            "weight_decay": 1e-4,
            "class_weight": 1.0,
            "diversity_weight": 1.0,
            "published": False,
        }
    )
    fields.dfrd = config_dict.ConfigDict(
        {
            "iterations": 10,
            "generator_steps": 2,
            "student_steps": 5,
            "batch_size": 64,
            "latent_dim": 100,
            "width": 128,
            "generator_learning_rate": 2e-4,
            "student_learning_rate": 0.01,
            "weight_decay": 1e-4,
            "transfer_weight": 1.0,
            "diversity_weight": 1.0,
            "average_decay": 0.5,
            "average_share": 0.5,
            "temperature": 10.0,
        }
    )

    config.generators = generators = config_dict.ConfigDict()
    generators.when = "after_init"  # or before_init, as in the published code
    generators.epochs = 200  # passes over each client's images; 0: use steps
    # Bounds on a client's steps where they are counted in epochs: 200 epochs of 72
    # images are 400 steps, too few for a GAN; the largest client takes 31,400.
    generators.min_steps = 2000
    generators.max_steps = 0  # 0: no bound
    generators.steps = 0  # the same number of steps for each client; 0: use epochs
    generators.batch_size = 64
    generators.learning_rate = 2e-4  # Adam(0.5, 0.999) for both players
    generators.latent_dim = 100
    generators.width = 64  # ngf and ndf
    generators.entropy_weight = 0.0  # > 0: images that the classifier is sure of
    generators.diversity_weight = 5.0  # spreads images over classes
    generators.diversity_target = "labels"  # the client's own; published: uniform
    generators.inversion_weight = 0.01  # match the global model's batch-norm moments
    generators.inversion_below = 1000  # only clients with fewer images than this (tau)
    generators.classifier = "client"  # local model of the last round, or fresh
    generators.classifier_epochs = 50  # of training a fresh classifier
    generators.classifier_batch_norm = "eval"  # published: train (moments of fakes)
    generators.value_range = "signed"  # published: normalised reals, tanh fakes
    generators.translate = 0  # pixels by which the discriminator's input is shifted
    generators.ema_decay = 0.0  # > 0: upload the running mean of the generator
    generators.collapse_below = 0.05  # pixel deviation over samples, on a scale of 2

    config.warmup = warmup = config_dict.ConfigDict()
    warmup.rounds = 40

    config.experts = experts = config_dict.ConfigDict()
    experts.local_steps = 0  # extra local steps before the experts are formed
    # Whose models count where init.clients_per_round draws some: the last one of all
    # that ever trained, however old, or of those of the latest round alone.
    experts.participants = "all"  # or latest

    config.prototypes = prototypes = config_dict.ConfigDict()
    prototypes.clusters = 10  # centres per client and class
    prototypes.space = "expert"  # each expert's features; or client, global
    prototypes.iterations = 20  # of k-means

    config.meta = meta = config_dict.ConfigDict()
    meta.head = "linear"  # or transformer (published), diagonal, mean (untrained)
    meta.steps = 1000
    meta.batch_size = 128
    meta.learning_rate = 1e-3  # Adam
    meta.ema_decay = 0.99  # the teacher is the running mean of the head
    meta.ema_debiased = True  # False: the mean starts at the random initial head
    meta.gate = "none"  # or global_topk: the global model's probabilities
    meta.gate_experts = 10  # experts that the gate keeps per image

    config.distill = distill = config_dict.ConfigDict()
    distill.source = "generated"  # validation: an upper bound on held-out real images
    distill.steps = 1500
    distill.samples_per_generator = 32
    distill.weighting = "uniform"  # of clients; size: by n_i
    distill.min_confidence = 0.0  # images of a less sure teacher are left out
    distill.augment = "none"  # data: as real training images; translate
    distill.learning_rate = 1e-4  # Adam
    distill.schedule = "constant"  # or cosine
    distill.temperature = 1.0
    distill.alpha = 0.8  # share of the soft target
    distill.beta = 1.0  # weight of the divergence
    distill.divergence = "jsd"  # or logit_mean, what the published code computes
    distill.batch_norm = "eval"  # of the student; or train

    config.finetune = finetune = config_dict.ConfigDict()
    finetune.rounds = 40
    finetune.learning_rate = 1e-4

    # What the clients' generators give away; the method never sees what is found.
    config.audit = audit = config_dict.ConfigDict()
    audit.images = 256  # generated by each client; 0: no audit
    audit.reference_steps = 1000  # of a classifier on all real images, for features

    config.evaluation = evaluation = config_dict.ConfigDict()
    evaluation.batch_size = 256
    evaluation.every = 10  # rounds between evaluations of the global model

    config.compute = compute = config_dict.ConfigDict()
    compute.devices = 0  # over which clients are dealt; 0: all there are
    compute.clients_at_once = 0  # clients batched on a device; 0: as memory allows
    compute.seeds_at_once = 0  # of config.seeds; 0: as memory allows, one on CPUs
    compute.client_state = "auto"  # of algorithms that keep one: device, host memory
    compute.convolution = "auto"  # or grouped, dense, patches: docs/performance.md

    config.log = log = config_dict.ConfigDict()
    log.every_steps = 50  # steps between log lines, and the unit of resuming
    log.checkpoint_seconds = 60.0  # least time between checkpoints within a stage
    log.tensorboard = True
    log.wandb = False  # needs pip install wandb; WANDB_MODE=offline keeps it local
    return config


def for_two_cores() -> config_dict.ConfigDict:
    """The defaults with networks, rounds and steps for minutes on two CPU cores.

    To start from, like `get_config`: a function that takes no config cannot undo what a
    special one has set.
    """
    config = get_config()
    config.model.width = 8
    config.local.batch_size = 32
    config.local.learning_rate = 0.05
    config.init.rounds = 40
    config.warmup.rounds = 0
    config.generators.epochs = 0
    config.generators.steps = 500
    config.generators.batch_size = 32
    config.generators.learning_rate = 1e-3
    config.distill.steps = 200
    config.distill.learning_rate = 1e-3
    config.distill.schedule = "cosine"
    config.finetune.rounds = 6
    config.finetune.learning_rate = 0.01
    config.server.rounds = 30
    config.audit.reference_steps = 100
    # Rates and mu: docs/methods.md has the search.
    fields = config.methods
    fields.fedprox.mu = 1.0
    fields.fedrs.alpha = 0.9
    fields.dense.batch_size = 64
    fields.dense.width = 16
    fields.fedftg.iterations = 3
    fields.fedftg.width = 16
    fields.fedftg.student_steps = 2
    fields.fedftg.student_learning_rate = 0.003
    fields.dfrd.iterations = 3
    fields.dfrd.generator_steps = 1
    fields.dfrd.student_steps = 2
    fields.dfrd.student_learning_rate = 0.003
    fields.dfrd.width = 32
    fields.dfrd.generator_learning_rate = 1e-3
    return config


def parts(variant: str) -> tuple[str, str]:
    """Method and variant of a Mosaic config, "default" if none, in METHOD[:VARIANT]."""
    method, _, rest = variant.partition(":")
    return method, rest or "default"


def known(variant: str, *variants: str) -> str:
    """`variant`, if it is one of `variants`.

    Raises:
      ValueError: it is not.
    """
    if variant not in variants:
        raise ValueError(f"{variant}: unknown variant; known: {', '.join(variants)}")
    return variant


def baseline(config: config_dict.ConfigDict, method: str) -> config_dict.ConfigDict:
    """Turn a Mosaic study into one of `method`, or a list's name into a comparison."""
    if method in methods.LISTS:
        config.compare = method
    else:
        methods.choose(config, method)
    return config
