# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First study in five minutes
#
# Ten clients hold real handwritten digits, most of them one or two of the ten
# classes. They train together by FedAvg, then their generators teach the global model
# what each of them knows. The steps are few and the network is small, so that it ends
# soon on two cores; accuracies are those of a taste, not of the method.
# `configs/digits_mosaic.py` without the changes below is the demo.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import sklearn.datasets

import mosaic_jax as mj

# %% [markdown]
# ## Settings
#
# A configuration is nested settings with a default for everything; `mosaic list
# fields` prints what each of them means.

# %%
config = mj.configs.get("digits_mosaic")
config.model.name = "mlp"
config.model.width = 64
config.init.rounds = 20
config.generators.steps = 300
config.meta.steps = 500
config.finetune.rounds = 0
config.audit.images = 0
config.evaluation.every = 2

# %% [markdown]
# A study checks all of them when it is made. It knows its stages, and which result
# each of them will have: the fingerprint.

# %%
study = mj.Study(config, "runs/first_study")
study.fingerprints()

# %% [markdown]
# ## Run
#
# Run this cell again and nothing is trained: every stage is found. Interrupt it, and
# it goes on from there.

# %%
result = study.run()
result

# %% [markdown]
# `init` is FedAvg, `teacher` the experts that the server made of the clients' models,
# `distilled` the student after generated images alone.
#
# ## What the clients hold
#
# Rows are clients, columns are digits.

# %%
counts = np.array(result.summary.partition["label_counts"])
plt.imshow(counts, cmap="Blues")
plt.xlabel("digit")
plt.ylabel("client")
plt.colorbar(label="images")
plt.show()

# %% [markdown]
# ## Curves

# %%
history = result.history
rounds = history[history.stage == "init"].set_index("step")
rounds["test_accuracy"].dropna().plot(
    xlabel="round", ylabel="test accuracy", label="FedAvg"
)
plt.axhline(result.summary.test_accuracy["final"], color="C1", label="distilled")
plt.legend()
plt.show()

# %% [markdown]
# ## What crossed, in megabytes

# %%
pd.DataFrame(result.summary.communication_bytes).fillna(0) / 1e6

# %% [markdown]
# ## The model
#
# It takes images as you have them, here digits of 8 x 8 with values to 16.

# %%
digits = sklearn.datasets.load_digits()
images, labels = digits.images[:8] / 16, digits.target[:8]
predicted = result.models["final"].predict(images)
figure, axes = plt.subplots(1, len(images), figsize=(8, 1.4))
for axis, image, label in zip(axes, images, predicted, strict=True):
    axis.imshow(image, cmap="gray")
    axis.set_title(label)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## The report
#
# One file that loads nothing from outside: classes, confusion, clients, real and
# generated digits, costs.

# %%
result.report()

# %% [markdown]
# ## What a change would cost
#
# Twice as many steps of distillation: the stages whose fingerprints stay would be
# reused (`mosaic run --reuse_from runs/first_study`), the others run.

# %%
before = study.fingerprints()
config.distill.steps *= 2
after = mj.Study(config).fingerprints()
{name: "reused" if after[name] == before[name] else "runs" for name in after}
