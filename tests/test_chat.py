"""Conversations as ids: what is read, what of it is learnt, and that nobody's words become a part of the form."""

import functools
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from natfp_jax import chat
from natfp_jax.chat import Chat
from natfp_jax.config import Conversations, Corpus, MachineQA, Template, from_json
from natfp_jax.errors import UserError
from natfp_jax.files import canonical_json
from natfp_jax.ingest import training_sample
from natfp_jax.packing import BEGINS, IDS, LEARNT
from natfp_jax.progress import Progress
from natfp_jax.tokenizer import EOS, Tokenizer

BYTES = Tokenizer.train(iter(["x"]), 257)  # 0: EOS, 1 to 94: "!" to "~", 199: a new line, 221: a space
SHORT = Template(system="S{content}|", user="U{content}?", assistant="A{content}")
CHATML = Template(
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{content}",
    end_of_turn="<|im_end|>",
)


def with_specials(tokenizer, *added):
    """The tokenizer.json with these special tokens besides its own."""
    model = tokenizers.Tokenizer.from_str(tokenizer.file.decode())
    model.add_special_tokens(list(added))
    return Tokenizer(model.to_str().encode())


SPECIAL = with_specials(
    Tokenizer.train(iter(["What is it? It is what it is.\nuser assistant system"] * 3), 280), "<|im_start|>", "<|im_end|>"
)
START, END = (SPECIAL.special(token) for token in ("<|im_start|>", "<|im_end|>"))


def messages(*said):
    return [{"role": role, "content": content} for role, content in said]


def encoded(form, *conversations):
    return form.encode([canonical_json(one) for one in conversations])


@functools.cache
def library(tokenizer):
    return tokenizers.Tokenizer.from_str(tokenizer.file.decode())


def raw(tokenizer, ids):
    """The text of ids with all special tokens in it, by the library alone."""
    return library(tokenizer).decode([int(one) for one in ids], skip_special_tokens=False)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_answer_and_what_ends_it_are_learnt_and_nothing_else():
    (found,) = encoded(Chat(BYTES, SHORT), messages(("user", "hi"), ("assistant", "yo")))
    assert found.dtype == np.dtype("<u4")
    #               EOS U   h   i   ?   A   y   o   EOS
    assert (found & IDS).tolist() == [0, 53, 72, 73, 31, 33, 89, 79, 0]
    assert np.flatnonzero(found & LEARNT).tolist() == [6, 7, 8]
    assert np.flatnonzero(found & BEGINS).tolist() == [0]


def test_every_answer_of_several_turns_is_learnt_and_the_system_is_read():
    talk = messages(("system", "be"), ("user", "a b"), ("assistant", "c"), ("user", "d\n"), ("assistant", "e"))
    (found,) = encoded(Chat(BYTES, SHORT), talk)
    system, first, answer = [51, 66, 69, 92], [53, 65, 221, 66, 31], [33, 67, 0]
    second, last = [53, 68, 199, 31], [33, 69, 0]
    assert (found & IDS).tolist() == [0, *system, *first, *answer, *second, *last]
    assert np.flatnonzero(found & LEARNT).tolist() == [11, 12, 18, 19]
    assert np.flatnonzero(found & BEGINS).tolist() == [0]


def test_what_the_template_writes_behind_an_answer_is_learnt_with_it():
    form = Chat(BYTES, replace(SHORT, assistant="A{content}!"))
    (found,) = encoded(form, messages(("user", "hi"), ("assistant", "yo")))
    assert (found & IDS).tolist() == [0, 53, 72, 73, 31, 33, 89, 79, 1, 0]
    assert np.flatnonzero(found & LEARNT).tolist() == [6, 7, 8, 9]


def test_conversations_are_encoded_together_as_alone():
    form = Chat(SPECIAL, CHATML)
    talks = [messages(("user", "x" * n), ("assistant", "y\n" * n)) for n in (1, 5, 2)]
    together = encoded(form, *talks)
    for one, talk in zip(together, talks, strict=True):
        np.testing.assert_array_equal(one, encoded(form, talk)[0])
    assert form.asked([chat.question(talk) for talk in talks]) == [form.asked([chat.question(talk)])[0] for talk in talks]


# --- whatever is said -------------------------------------------------------------------------------------------------

FORMS = [EOS, "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "{content}", "Answer:\n", "\n", " ", "\0", "\U0001f600"]
CONTENT = st.lists(st.text(max_size=8) | st.sampled_from(FORMS), max_size=4).map("".join)
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)
CHATS = st.sampled_from([Chat(SPECIAL, CHATML), Chat(SPECIAL, Template()), Chat(BYTES, SHORT)])


@st.composite
def conversations(draw):
    system = draw(st.none() | CONTENT)
    talk = [] if system is None else messages(("system", system))
    for asked, answered in draw(TURNS):
        talk += messages(("user", asked), ("assistant", answered))
    return talk


def parts(template, talk):
    """The form and the contents of a conversation, one after another, and which of them are learnt."""
    found = [(EOS, "form", False)]
    for message in talk:
        before, after = getattr(template, message["role"]).split("{content}")
        answers = message["role"] == "assistant"
        found += [(before, "form", False), (message["content"], "said", answers), (after, "form", answers)]
        found += [(template.end_of_turn, "form", True)] if answers else []
    return found


@given(form=CHATS, talk=conversations())
def test_the_ids_decode_to_what_the_template_writes(form, talk):
    (found,) = encoded(form, talk)
    assert raw(form.tokenizer, found & IDS) == "".join(text for text, _, _ in parts(form.template, talk))
    learnt = raw(form.tokenizer, (found & IDS)[found & LEARNT != 0])
    assert learnt == "".join(text for text, _, learnt in parts(form.template, talk) if learnt)
    (asked,) = form.asked([chat.question(talk)])
    assert raw(form.tokenizer, asked) == EOS + form.text(chat.question(talk))


@given(form=CHATS, talk=conversations())
def test_special_tokens_are_those_of_the_template_and_no_other(form, talk):
    tokenizer = form.tokenizer
    specials = {token: tokenizer.special(token) for token in tokenizer.specials}
    (found,) = encoded(form, talk)
    written = "".join(text for text, kind, _ in parts(form.template, talk) if kind == "form")
    for token, one in specials.items():
        assert ((found & IDS) == one).sum() == written.count(token)


@given(form=CHATS, talk=conversations(), others=TURNS)
def test_a_question_is_the_beginning_of_every_conversation_that_begins_with_it(form, talk, others):
    question = chat.question(talk)
    assert question == talk[: len(question)]
    assert [message["role"] for message in question][-1] == "user"
    (asked,) = form.asked([question])
    for _, answered in others:
        (found,) = encoded(form, [*question, *messages(("assistant", answered), ("user", "and"), ("assistant", "so"))])
        assert (found & IDS)[: len(asked)].tolist() == asked
        assert not (found[: len(asked)] & LEARNT).any()
        assert found[len(asked)] & LEARNT  # the first that is learnt is the first that it has to say


def test_the_special_tokens_of_a_template_are_one_id_each():
    (found,) = encoded(Chat(SPECIAL, CHATML), messages(("user", "<|im_end|>"), ("assistant", "<|im_start|>")))
    ids = (found & IDS).tolist()
    assert (ids.count(START), ids.count(END), ids.count(SPECIAL.eos_id)) == (2, 2, 1)
    assert (ids[0], ids[1], ids[-1]) == (SPECIAL.eos_id, START, END)


def test_what_ends_a_turn_and_is_no_special_token_gives_one_line():
    for token in ("<|im_end|>", "x", "EOS\n"):
        with pytest.raises(UserError) as caught:
            _ = Chat(BYTES, replace(SHORT, end_of_turn=token)).end
        said = (
            f"template.end_of_turn {token!r} is no special token of the tokenizer: its special tokens are '<|eos|>'; take one"
        )
        assert str(caught.value).startswith(said)
        assert "\n" not in str(caught.value)
    plain = tokenizers.Tokenizer.from_str(BYTES.file.decode())
    plain.add_tokens(["<|im_end|>"])  # no special one: it would be found in what is said
    with pytest.raises(UserError, match="is no special token"):
        _ = Chat(Tokenizer(plain.to_str().encode()), CHATML).end
    assert Chat(SPECIAL, CHATML).end == END
    assert Chat(SPECIAL, Template()).end == SPECIAL.eos_id


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("form", ["", "content", "{content}{content}"])
def test_a_template_writes_a_message_once(role, form):
    with pytest.raises(UserError, match="exactly once") as caught:
        from_json(Template, {role: form})
    assert "\n" not in str(caught.value)


# --- documents --------------------------------------------------------------------------------------------------------


@given(
    asked=CONTENT, talks=st.lists(conversations(), min_size=2, max_size=5), fractions=st.tuples(*[st.floats(0.01, 0.49)] * 2)
)
def test_conversations_in_which_a_user_begins_alike_are_on_one_side(asked, talks, fractions):
    for talk in talks:
        next(message for message in talk if message["role"] == "user")["content"] = asked
    corpus = Corpus(source=MachineQA(), validation_fraction=fractions[0], prompt_fraction=fractions[1])
    texts = [canonical_json(talk) for talk in talks]
    found = [chat.document(text) for text in texts]
    assert len({document.part(corpus) for document in found}) == len({document.id for document in found}) == 1
    assert [document.text for document in found] == texts
    assert len({document.digest for document in found}) == len(set(texts))  # and only the same conversation is a duplicate
    assert found[0].id == hashlib.sha256(asked.encode()).hexdigest()[:32]


def test_a_tokenizer_learns_from_what_is_said_in_training_alone():
    talks = [messages(("user", f"zzz {i} zzz?"), ("assistant", f"qqq {i} qqq.")) for i in range(300)]
    texts, corpus = [canonical_json(talk) for talk in talks], Corpus(source=Conversations("x"), vocabulary=270)
    quiet = Progress(quiet=True)
    sample = list(training_sample(texts, corpus, quiet, chat.document, chat.contents))
    train = [talk for talk, text in zip(talks, texts, strict=True) if chat.document(text).part(corpus) == "train"]
    assert 100 < len(train) < 300
    assert sample == [f"{asked['content']}\n{answered['content']}" for asked, answered in train]
    tokenizer = Tokenizer.train(iter(sample), corpus.vocabulary)
    assert len(tokenizer.encode("zzz")) == 1  # merges are spent on what is said, not on its form
    assert len(tokenizer.encode("role")) == 4
    form = Chat(tokenizer, corpus.template)
    (found,) = encoded(form, talks[0])
    assert raw(tokenizer, found & IDS) == f"{EOS}Question:\nzzz 0 zzz?\nAnswer:\nqqq 0 qqq.{EOS}"
