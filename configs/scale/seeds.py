"""Two initialisations x two data orders of models of 70M to 7B parameters, on the hardware that is rented for it.

    natfp plan configs/scale/seeds.py size=160m hardware=v5e-16 --topology v5e:4x4     # before it is rented
    natfp run configs/scale/seeds.py size=160m hardware=v5e-16 --out gs://bucket/out    # or /shared/out, on every host

    size        70m, 160m, 410m, 1.4b (the shapes of Pythia, Biderman et al., 2023, with SwiGLU), 7b (that of Llama 2)
    hardware    h200x1 (up to 1.4b), h200x8, v5e-16 (v5e:4x4), v5e-256 (v5e:16x16), v5p-64 (v5p:2x4x4: 64 cores are 32 chips)

Every arm sees 20 tokens a parameter of c4/en once (Hoffmann et al., 2022), in windows of 2048 and half a million tokens a step,
in bfloat16. Where a model leaves room, the four arms train side by side along `replica`; else each takes all devices.

Cost: what `natfp plan` says is the least; none of these has been run. Expectation: ceilings near 100 % throughout, and the
larger the model, the fainter the init at the end of training.
"""

from typing import Literal

from natfp_jax.config import Corpus, Data, Experiment, Factor, Mesh, Model, Optimiser, Run, Sampling, Seeds, Study, Tfds

Size = Literal["70m", "160m", "410m", "1.4b", "7b"]
Hardware = Literal["h200x1", "h200x8", "v5e-16", "v5e-256", "v5p-64"]

BATCH, SEQ_LEN = 256, 2048
MODELS = {
    "70m": Model(width=512, layers=6, heads=8, dtype="bfloat16"),
    "160m": Model(width=768, layers=12, heads=12, dtype="bfloat16"),
    "410m": Model(width=1024, layers=24, heads=16, dtype="bfloat16"),
    "1.4b": Model(width=2048, layers=24, heads=16, dtype="bfloat16", tied=False),
    "7b": Model(width=4096, layers=32, heads=32, mlp_width=11008, dtype="bfloat16", tied=False),
}
STEPS = {"70m": 2_670, "160m": 6_100, "410m": 15_600, "1.4b": 53_400, "7b": 257_000}  # 20 tokens a parameter
RATES = {"70m": 1e-3, "160m": 6e-4, "410m": 3e-4, "1.4b": 2e-4, "7b": 1.2e-4}
# Arms side by side, and the devices over which one model is cut.
MESHES: dict[Hardware, dict[Size, Mesh]] = {
    "h200x1": {size: Mesh() for size in ("70m", "160m", "410m", "1.4b")},
    "h200x8": {
        **{size: Mesh(replica=4) for size in ("70m", "160m", "410m")},
        "1.4b": Mesh(replica=4, fsdp=2),
        "7b": Mesh(fsdp=8),
    },
    "v5e-16": {
        **{size: Mesh(replica=4) for size in ("70m", "160m")},
        "410m": Mesh(replica=4, fsdp=4),
        "1.4b": Mesh(fsdp=16),
        "7b": Mesh(fsdp=16),
    },
    "v5e-256": {
        **{size: Mesh(replica=4) for size in ("70m", "160m")},
        **{size: Mesh(replica=4, fsdp=16) for size in ("410m", "1.4b")},
        "7b": Mesh(fsdp=64),
    },
    "v5p-64": {
        **{size: Mesh(replica=4) for size in ("70m", "160m", "410m")},
        "1.4b": Mesh(replica=4, fsdp=8),
        "7b": Mesh(fsdp=32),
    },
}
# Windows that a device takes at once: its memory holds what a layer computes of them.
OF_H200: dict[Size, int] = {"70m": 32, "160m": 16, "410m": 16, "1.4b": 8, "7b": 4}
OF_V5E: dict[Size, int] = {"70m": 16, "160m": 8, "410m": 4, "1.4b": 4, "7b": 1}
OF_V5P: dict[Size, int] = {"70m": 32, "160m": 16, "410m": 16, "1.4b": 8, "7b": 4}
AT_ONCE: dict[Hardware, dict[Size, int]] = {
    **dict.fromkeys(("h200x1", "h200x8"), OF_H200),
    **dict.fromkeys(("v5e-16", "v5e-256"), OF_V5E),
    "v5p-64": OF_V5P,
}
DEVICES: dict[Hardware, int] = {"h200x1": 1, "h200x8": 8, "v5e-16": 16, "v5e-256": 256, "v5p-64": 32}


def study(size: Size = "70m", hardware: Hardware = "v5e-16") -> Study:
    """The study of a size on some hardware."""
    if size not in MESHES[hardware]:
        raise ValueError(f"size={size} has no room on {hardware}: give hardware=h200x8, v5e-16, v5e-256 or v5p-64")
    mesh = MESHES[hardware][size]
    rows = BATCH // (DEVICES[hardware] // mesh.replica)
    return Study(
        name=f"scale-{size}-{hardware}",
        experiment=Experiment(
            corpus=Corpus(source=Tfds("c4/en"), vocabulary=32_768, validation_fraction=0.0005, prompt_fraction=0.01),
            model=MODELS[size],
            data=Data(seq_len=SEQ_LEN, windows=STEPS[size] * BATCH, batch=BATCH),
            optimiser=Optimiser(learning_rate=RATES[size], warmup=0.01),
            seeds=Seeds(init=0, order=0),
        ),
        factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
        run=Run(
            mesh=mesh,
            cohort=mesh.replica,
            remat="full",
            microbatches=max(1, rows // AT_ONCE[hardware][size]),
            checkpoints=(0.01, 0.03, 0.1, 0.3),
        ),
        sampling=Sampling(prompts=100_000, new_tokens=64, checkpoints=(0.03, 0.3, 1.0)),
    )
