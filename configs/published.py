"""Which of several published models wrote a text? The same prompts to each, and who can tell.

    natfp run configs/published.py models='["/models/pythia-160m-seed1", "/models/pythia-160m-seed2"]'
    natfp run configs/published.py models='["hf://EleutherAI/pythia-160m-seed1", "hf://EleutherAI/pythia-160m-seed2"]'

Each is a folder in Hugging Face's layout with safetensors weights and a tokenizer.json, of the families of Llama (with it
Mistral, Qwen2 and Qwen3), GPT-NeoX (Pythia) or GPT-2, and needs the `hf` extra. Nothing is trained: each model writes one text
for each prompt, which is the beginning of a document found on this machine, and the first one writes twice (the null). For
other prompts set experiment.corpus.source or sampling.prompt_file. run.mesh.tensor cuts a model that no device holds.

Cost: 2,000 texts of 64 tokens a model. Expectation: models of one suite that differ in a seed are told apart by their
likelihoods nearly always, and by a bag of subwords somewhat more often than by chance; those of different families by anything.
"""

import re

from natfp_jax.config import Corpus, Experiment, Factor, MachineDocs, Published, Sampling, Study


def names(folders: tuple[str, ...]) -> list[str]:
    """What each is called: as much of the end of its name as tells them all apart."""
    parts = [re.split(r"[/@]+", folder.removeprefix("hf://").strip("/")) for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        found = [re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(some[-count:])).strip("-.") for some in parts]
        if len(set(found)) == len(found):
            break
    return found


def study(models: tuple[str, ...] = ("models/one", "models/other")) -> Study:
    """The study of these folders."""
    named = [Published(name, folder) for name, folder in zip(names(models), models, strict=True)]
    return Study(
        name="published",
        experiment=Experiment(corpus=Corpus(source=MachineDocs(), vocabulary=2048)),
        factors=(Factor("published", tuple(named)),),
        sampling=Sampling(prompts=2000, new_tokens=64),
    )
