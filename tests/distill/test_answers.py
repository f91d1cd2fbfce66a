"""A reference that sees the answer: what it is asked is what a decoder of the prompt with the answer would compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.blocks import block_ids
from t3d.config import load_recipe
from t3d.decoding import DecodingConfig
from t3d.distill import T3DConfig, T3DTrainer
from t3d.distill.answer_prompts import AnswerPrompts
from t3d.distill.batch import TrainingBatch, collate, when_committed, with_answers
from t3d.distill.data import StateDataset
from t3d.distill.objective import OBJECTIVES, Privileged
from t3d.distill.objectives.mean_field import masked_one_by_one, place_in_block
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.study.config import labels
from t3d.tasks import Problem, TaskConfig, get_task
from t3d.tasks.tokenizer import word_tokenizer
from t3d.tasks.word_problems import build_tokenizer
from tests.conftest import make_model
from tests.distill.test_layout import MASK, PAD, decoder_logits, random_trajectory
from tests.distill.test_trainer import config, trajectories, weights

PRIVILEGED = [name for name, objective in OBJECTIVES.items() if issubclass(objective, Privileged)]


def answered(trajectory):
    """A stand-in for the prompt with the answer: another length, and nothing in the same place."""
    rng = np.random.default_rng(trajectory.prompt_ids)
    return rng.integers(2, 60, len(trajectory.prompt_ids) + int(rng.integers(1, 12))).tolist()


def slow_logits(model, batch, place, trajectory, prompt):
    """At one supervised position of a version of the student's batch: the answered prompt, the final tokens, and what
    is noisy, as one text without packing or cache, whose first block lacks places so that the blocks are the
    student's."""
    size, start = trajectory.block_size, len(trajectory.prompt_ids)
    document, copy, group, position, block = (
        int(x.flatten()[place]) for x in (batch.document, batch.copy, batch.group, batch.position, batch.layout.block)
    )
    noisy = (batch.document == document) & (batch.copy == copy) & (batch.group == group) & (batch.layout.block <= block)
    noisy &= batch.position >= start
    ids = batch.input_ids[noisy][batch.position[noisy].argsort()].tolist()
    final = trajectory.response_ids[: max(group * size - start, 0)]
    text = torch.tensor([[*prompt, *final, *ids]])
    missing = (start - len(prompt)) % size
    if missing == 0:
        first = len(prompt) + start // size * size - start if not final else len(prompt) + len(final)
        whole = decoder_logits(model, replace(trajectory, prompt_ids=prompt), text[0, first:].tolist(), first)
        return whole[len(prompt) + position - start - first]
    blocks = block_ids(torch.arange(text.shape[1]) + missing, size)
    mask = (blocks[None, :] <= blocks[:, None])[None, None]
    return model(text, mask, torch.arange(text.shape[1])[None]).logits[0, len(prompt) + position - start]


@given(
    seed=st.integers(0, 10**6),
    block_size=st.sampled_from([1, 2, 3, 4, 8]),
    size=st.integers(1, 3),
    copies=st.integers(1, 2),
    longest=st.integers(1, 30),
    pack_length=st.sampled_from([0, 1, 200, 10**6]),
    attention=st.sampled_from(["sdpa", "eager", "block_sdpa", "flex_attention"]),
    version=st.sampled_from(["same", "committed", "one by one"]),
)
@settings(max_examples=40, deadline=None)
def test_the_reference_is_asked_what_a_decoder_of_its_prompt_would_compute(
    seed, block_size, size, copies, longest, pack_length, attention, version
):
    rng = np.random.default_rng(seed)
    data = [random_trajectory(rng, block_size, int(rng.integers(1, 14)), int(rng.integers(1, 4))) for _ in range(3)]
    prompts = {t.prompt_id: rng.integers(2, 60, int(rng.integers(1, longest + 1))).tolist() for t in data}
    arguments = T3DConfig(
        output_dir="unused", objective="soft", reference_sees="answer", state="uniform", seed=seed, use_cpu=True,
        states_per_sequence=copies, group_size=size,
    )  # fmt: skip
    dataset = StateDataset(data, arguments, block_size, MASK, 60, lambda t: prompts[t.prompt_id])
    batch = TrainingBatch(**collate([dataset[i] for i in range(3)], PAD, block_size, pack_length))
    if version == "committed":
        which = torch.from_numpy(rng.random(len(batch.select)) < 0.7)
        batch = when_committed(batch, which, MASK)
    elif version == "one by one":
        turn = place_in_block(batch.block)
        batch = masked_one_by_one(batch, batch.target, turn, int(turn.max()) + 1, MASK)
    asked = with_answers(batch)
    assert torch.equal(asked.target, batch.target)
    model = make_model(block_size=block_size)
    model.set_attn_implementation(attention)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        mask = asked.layout.attention_mask(attention)
        logits = model(asked.input_ids, mask, asked.position, select=asked.select)
    model.set_attn_implementation("sdpa")
    document = batch.document.flatten()[batch.select]
    assert len(logits) == len(document)
    for i, place in enumerate(batch.select.tolist()):
        trajectory = data[document[i]]
        with torch.no_grad():
            expected = slow_logits(model, batch, place, trajectory, prompts[trajectory.prompt_id])
        torch.testing.assert_close(logits[i], expected, atol=2e-4, rtol=1e-4)


def test_it_is_the_engines_confidence_where_the_answered_prompt_fills_its_blocks():
    """Responses decoded from the answered prompt itself: with `committed` states its confidences come back."""
    model, rng = make_model(eos_token_id=None), np.random.default_rng(1)
    prompts = [rng.integers(2, 60, n).tolist() for n in (5, 6, 11)]
    longer = [rng.integers(2, 60, 8).tolist() + prompt for prompt in prompts]
    found = Engine(model).generate(longer, DecodingConfig(max_tokens=12))
    data = [replace(t, prompt_ids=prompt) for t, prompt in zip(found, prompts, strict=True)]
    arguments = T3DConfig(output_dir="unused", objective="dcd", reference_sees="answer", use_cpu=True)
    dataset = StateDataset(data, arguments, 4, MASK, 60, lambda t: longer[prompts.index(t.prompt_ids)])
    batch = TrainingBatch(**collate([dataset[i] for i in range(3)], PAD, 4))
    asked = with_answers(when_committed(batch, torch.ones_like(batch.part, dtype=torch.bool), MASK))
    with torch.no_grad():
        logits = model(asked.input_ids, asked.layout.boolean_mask(), asked.position, select=asked.select)
    logits[:, MASK] = -torch.inf
    confidence = logits.softmax(-1).gather(1, asked.target[:, None])[:, 0]
    document, position = batch.document.flatten()[batch.select], batch.position.flatten()[batch.select]
    assert len(confidence) == sum(len(t.response_ids) for t in data)
    for d, p, mine in zip(document.tolist(), position.tolist(), confidence.tolist(), strict=True):
        assert abs(data[d].confidence[p - len(prompts[d])] - mine) < 1e-4


@pytest.mark.parametrize("name", PRIVILEGED)
def test_only_the_reference_sees_the_answer(tmp_path, name):
    seen = []

    class Watch(T3DTrainer):
        def forward(self, network, head, batch):
            seen.append((self.reference is not None and network is self.reference.model, batch))
            return super().forward(network, head, batch)

    settings = {"objective": name, "reference_sees": "answer", "max_steps": 2, "round_interval": 0}
    data = trajectories(4)
    Watch(make_model(), config(tmp_path, **settings), data, answer_prompts=answered).train()
    prompts = {True: sorted(map(answered, data)), False: sorted(t.prompt_ids for t in data)}
    assert {asked for asked, _ in seen} == {True, False}
    for asked, batch in seen:
        for document in batch.document.unique().tolist():
            mine = (batch.document == document) & (batch.copy == 0)
            text = batch.input_ids[mine][batch.position[mine].argsort()].tolist()
            assert document == -1 or any(text[: len(prompt)] == prompt for prompt in prompts[asked])


@pytest.mark.parametrize("name", PRIVILEGED)
def test_a_prompt_that_tells_nothing_changes_nothing(tmp_path, name):
    """In the contexts of others and the student's own, to the bit."""
    runs = []
    for sees in ("prompt", "answer"):
        torch.manual_seed(0)
        settings = {"objective": name, "reference_sees": sees, "max_steps": 3, "save_steps": 100}
        if hasattr(OBJECTIVES[name], "on_policy_steps"):
            settings["on_policy_share"] = 0.5
        trainer = T3DTrainer(
            make_model(), config(tmp_path, **settings), trajectories(), answer_prompts=lambda t: t.prompt_ids
        )
        trainer.train()
        runs.append(weights(trainer.model))
    for key, weight in runs[0].items():
        assert torch.equal(weight, runs[1][key]), key


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "tad", "group_size": 2},
        {"objective": "mean_field", "on_policy_share": 0.5, "draft_share": 0.5, "round_interval": 0},
        {"objective": "dcd", "on_policy_share": 0.5, "lora_rank": 2},
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, settings):
    if "lora_rank" in settings:
        pytest.importorskip("peft", reason="needs t3d[lora]")

    def trainer(**more):
        torch.manual_seed(0)  # an adapter starts at random
        arguments = config(tmp_path, **{"reference_sees": "answer"} | settings | more)
        return T3DTrainer(make_model(), arguments, trajectories(), answer_prompts=answered)

    whole, again, blind = trainer(), trainer(), trainer(reference_sees="prompt", save_steps=100)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    blind.train()
    for (name, a), b in zip(weights(whole.model).items(), weights(again.model).values(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(w, weights(blind.model)[name]) for name, w in weights(whole.model).items())


def test_accumulation_and_every_attention_give_the_same_training(tmp_path):
    runs = []
    for more in ({}, {"attention": "sdpa"}, {"attention": "eager"}, {"gradient_accumulation_steps": 2}):
        size = 4 // more.get("gradient_accumulation_steps", 1)
        settings = {"objective": "soft", "reference_sees": "answer", "optim": "sgd", "group_size": 2, **more}
        arguments = config(tmp_path, max_steps=3, save_steps=100, per_device_train_batch_size=size, **settings)
        trainer = T3DTrainer(make_model(), arguments, trajectories(), answer_prompts=answered)
        trainer.train()
        runs.append(weights(trainer.model))
    for other in runs[1:]:
        for name, weight in runs[0].items():
            torch.testing.assert_close(weight, other[name], atol=1e-5, rtol=1e-4)


def test_which_objectives_have_it_and_what_is_refused(tmp_path):
    assert set(PRIVILEGED) == {"soft", "dcd", "tad", "mean_field", "consistency", "dmd"}
    with pytest.raises(T3DError, match=r"train\.reference_sees is 'prompt' or 'answer', got 'answers'"):
        config(tmp_path, objective="tad", reference_sees="answers")
    arguments = config(tmp_path, objective="tad", reference_sees="answer")
    with pytest.raises(T3DError, match=r"train\.reference_sees=answer needs prompts.*`answer_prompts`"):
        T3DTrainer(make_model(), arguments, trajectories())


def test_a_study_does_not_call_it_label_free(tmp_path):
    (tmp_path / "recipe.yaml").write_text("task: {num_train: 2, num_eval: 2}")

    def said(*settings):
        return labels(load_recipe(tmp_path / "recipe.yaml", [f"train.{setting}" for setting in settings]))

    assert said("objective=soft", "reference_sees=answer") == "reference answers"
    assert said("objective=soft") == said("objective=path", "reference_sees=answer") == "no labels"


def test_prompts_with_the_answer_are_the_tasks_own():
    task, tokenizer = get_task(TaskConfig()), build_tokenizer()
    problems = task.problems("train", 3)
    shown = AnswerPrompts(task, problems[:2], tokenizer)
    for problem in problems:  # the last is known from its trajectory alone
        trajectory = replace(
            trajectories(1)[0],
            prompt_ids=task.prompt(problem, tokenizer),
            prompt_id=problem.id,
            question=problem.question,
            answer=problem.answer,
        )
        ids = shown(trajectory)
        text = tokenizer.decode(ids)
        assert tokenizer.unk_token_id not in ids
        assert f"\\boxed{{{problem.answer}}}" in text
        assert problem.question in text
        assert text.endswith("<|im_start|>assistant\n")
    with pytest.raises(T3DError, match=r"reference_sees: the prompt of trajectory 'word.*' is not what task 'word_pro"):
        shown(replace(trajectory, prompt_ids=trajectory.prompt_ids[1:]))
    with pytest.raises(T3DError, match="task 'word_problems' has no reference answer to 'mine'; give it one"):
        shown(replace(trajectory, prompt_id="mine", answer=None))


def test_the_answer_stands_in_a_system_message():
    tokenizer = word_tokenizer(["system", "Reference Answer: 12", "How many apples had Mia?"])
    task = get_task(TaskConfig(name="gsm8k", template="{question}"))
    problem = Problem("p", "How many apples had Mia?", "12")

    def told():
        return tokenizer.decode(task.answered_prompt(problem, tokenizer))

    message = "<|im_start|>{}\n{}<|im_end|>\n".format
    asked = message("user", problem.question) + "<|im_start|>assistant\n"
    assert told() == message("system", "Reference Answer: 12") + asked
    assert tokenizer.decode(task.prompt(problem, tokenizer)) == asked
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(T3DError, match="chat template shows no system message"):
        told()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(T3DError, match="chat template shows no system message"):
        told()
    tokenizer.chat_template = None
    assert told() == "Reference Answer: 12\n\nHow many apples had Mia?"
    code = get_task(TaskConfig(name="code", path="unused"))
    assert code.known_answer(Problem("p", "q", None, {"solution": "x = 1"})) == "x = 1"
    with pytest.raises(T3DError, match="task 'code' has no reference answer to 'p'"):
        code.answered_prompt(Problem("p", "q", None, {}), tokenizer)
