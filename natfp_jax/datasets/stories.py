"""Short stories with exact log-probability, for tests and benchmarks.

A model's loss a story minus `entropy()` estimates its Kullback-Leibler divergence from the truth, which checks a whole trainer.
Names and things, once introduced, recur: a model has to attend to more than the last word. Story `index` of `seed` is a
function of the two alone, drawn from sha256: the same on every machine. Any change of the text is a new VERSION.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from natfp_jax.datasets.builder import TextBuilder
from natfp_jax.datasets.grammar import Grammar

__all__ = ["Stories", "entropy", "log_probability", "story"]


def _evenly(options: str) -> dict[str, int]:
    """The options that `|` separates, all as likely."""
    return dict.fromkeys(options.split("|"), 1)


def _halving(options: str) -> dict[str, int]:
    """Each option half as likely as the one before; the last two alike."""
    texts = options.split("|")
    return {text: 1 << max(0, len(texts) - 2 - i) for i, text in enumerate(texts)}


_GRAMMAR = Grammar(
    {
        "story": _evenly(
            "One [weather] [time] [heroine as heroine] the [animal] lost a [colour as colour] [thing as thing]. "
            '"Will you help me to find it?" she asked [friend as friend] the [animal]. "[answer]," said {friend}. [search]'
        ),
        "search": {
            "They looked [place], but the {thing} was not there. [search]": 3,
            "They asked the [neighbour], who had seen nothing {colour} all day. [search]": 1,
            "[discovery] {heroine} was [mood] and [thanks]. [ending]": 4,
        },
        "discovery": _halving(
            "In the end {heroine} found the {colour} {thing} [place].|"
            "At last {friend} saw something {colour} [place]: it was the {thing}!|"
            "Then [stranger] came by with the {colour} {thing}. She had found it [place]."
        ),
        "weather": _evenly("sunny|rainy|windy|foggy|snowy|cloudy|stormy|frosty"),
        "time": _halving("morning|evening|afternoon|night"),
        "heroine": _evenly(
            "Ada|Bella|Clara|Dora|Edith|Flora|Greta|Hanna|Ines|Julia|Karla|Lotta|Maja|Nora|Olga|Paula|"
            "Quinta|Rosa|Sara|Thea|Ursula|Vera|Wanda|Xenia|Yvonne|Zora|Agnes|Berta|Cora|Doris|Elsa|Frieda"
        ),
        "friend": _evenly(
            "Anton|Bruno|Carl|David|Emil|Felix|Georg|Hugo|Igor|Jonas|Kurt|Leo|Max|Noah|Otto|Peter|"
            "Quentin|Robert|Simon|Theo|Uwe|Victor|Willem|Xaver|Yuri|Zeno|Adam|Boris|Dieter|Erik|Frank|Gustav"
        ),
        "stranger": _evenly("an old woman|the postwoman|a small girl|the queen"),
        "animal": _evenly("badger|bear|beetle|cat|deer|dog|duck|fox|goat|goose|hare|hedgehog|mole|mouse|otter|owl"),
        "colour": _halving("red|blue|green|yellow|white|black|silver|golden"),
        "thing": _evenly(
            "ball|basket|bell|book|boot|bottle|box|button|candle|coin|cup|drum|feather|flute|hat|key|"
            "kite|knife|ladder|lamp|letter|map|mirror|needle|pipe|ring|rope|scarf|shell|spoon|stone|whistle"
        ),
        "place": _evenly(
            "behind the barn|under the bridge|in the attic|on the roof|by the pond|near the mill|below the stairs|"
            "in the cellar|among the reeds|inside the old oak|next to the well|beside the road|in the tall grass|"
            "under the bed|behind the oven|at the edge of the wood"
        ),
        "neighbour": _evenly("baker|miller|shepherd|tailor|gardener|fisherman|teacher|carpenter"),
        "answer": _halving("Of course|With pleasure|Only if we hurry|After my supper"),
        "mood": _evenly("happy|glad|proud|tired|thankful|cheerful|relieved|merry"),
        "thanks": _halving("said thank you|sang a song|gave everyone a hug|danced in a ring"),
        "ending": _evenly(
            "They had tea together.|It never got lost again.|The {thing} has hung by the door ever since.|"
            "Everyone slept well that night.|She kept the {thing} close.|And {friend} laughed all the way home.|"
            "Nobody knows how it got there.|Soon they lost it again."
        ),
    },
    start="story",
)


def story(seed: int, index: int) -> str:
    """Story `index` (from 0) of `seed`. Two are alike with probability 2^-46: a million hold a double once in 140 times."""
    pool, size, block = 0, 0, 0

    def bits(count: int) -> int:
        nonlocal pool, size, block
        while size < count:
            pool = pool << 256 | int.from_bytes(hashlib.sha256(f"story {seed} {index} {block}".encode()).digest(), "big")
            size, block = size + 256, block + 1
        size -= count
        drawn, pool = pool >> size, pool & ((1 << size) - 1)
        return drawn

    return _GRAMMAR.draw(bits)


def log_probability(text: str) -> float:
    """The exact log-probability of `text` in nats; minus infinity for what is no story."""
    return _GRAMMAR.log_probability(text)


def entropy() -> float:
    """The exact mean of -log_probability over stories, in nats."""
    return _GRAMMAR.entropy()


class Stories(TextBuilder):
    """The first `count` stories of `seed`."""

    def __init__(self, *, data_dir: str | Path, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        super().__init__(
            data_dir=data_dir, inputs=f"seed{seed}-count{count}", description=f"The first {count} stories of seed {seed}"
        )

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields (index, story)."""
        for index in range(self._count):
            yield str(index), story(self._seed, index)
