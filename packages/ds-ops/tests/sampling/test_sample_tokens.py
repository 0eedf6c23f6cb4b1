"""sample_tokens: every implementation against the reference, and what a draw promises."""

from __future__ import annotations

import math

import pytest
import torch

import ds_ops
from ds_core import ops
from ds_core.errors import OpError
from ds_core.testing.contracts import OpContract

IMPLEMENTATIONS = ("reference", "torch")
#: Of chi-square with 9 degrees of freedom, 1 in 10000 is above this.
UNLIKELY = 33.72


class TestSampleTokens(OpContract):
    op = "sample_tokens"


def drawn(row, count, **settings):
    """Tokens of as many draws of one row of logits, each with a seed of its own."""
    logits = torch.tensor([row]).repeat(count, 1)
    return ds_ops.sample_tokens(logits, seeds=torch.arange(count), positions=3, **settings)[0]


def allowed(row, temperature, top_k, top_p, min_p):
    """Which tokens may be drawn, by sorting them in Python."""
    weights = [math.exp(z / temperature) for z in row]
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    order = order[: top_k or None]
    order = [token for token in order if weights[token] >= min_p * max(weights)]
    total, before, left = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if before >= top_p * total and left:
            break
        left.append(token)
        before += weights[token]
    return set(left)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (1.0, 4, 1.0, 0.0), (2.0, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.3),
     (3.0, 5, 0.7, 0.1), (1.0, 1, 0.5, 0.5), (1.0, 99, 0.01, 1.0), (9.0, 3, 0.67, 0.0)],
)  # fmt: skip
def test_exactly_what_the_settings_leave_is_drawn(implementation, temperature, top_k, top_p, min_p):
    row = [1.0, 2.0, 2.0, 0.0, 2.0, 1.0, -1.0, 1.5, 2.0, 0.5]
    with ops.use(sample_tokens=implementation):
        tokens = drawn(row, 3000, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(tokens.tolist()) == allowed(row, temperature, top_k, top_p, min_p)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6}, {"top_k": 6, "top_p": 0.9}, {"min_p": 0.1}]
)
def test_tokens_come_as_often_as_they_should(implementation, settings):
    row = [0.3 * i - (i % 3) for i in range(10)]
    temperature = settings.get("temperature", 1.0)
    left = allowed(
        row, temperature, settings.get("top_k", 0), settings.get("top_p", 1.0),
        settings.get("min_p", 0.0),
    )  # fmt: skip
    weights = {token: math.exp(row[token] / temperature) for token in left}
    count = 20_000
    with ops.use(sample_tokens=implementation):
        found = drawn(row, count, **settings).bincount(minlength=10).tolist()
    distance = 0.0
    for token, weight in weights.items():
        expected = count * weight / sum(weights.values())
        distance += (found[token] - expected) ** 2 / expected
    assert distance < UNLIKELY
    assert sum(found[token] for token in left) == count


def test_draws_of_one_request_are_as_independent_as_those_of_many():
    logits = torch.zeros(20_000, 10)
    positions = torch.arange(20_000)
    tokens, _ = ds_ops.sample_tokens(logits, seeds=42, positions=positions)
    pairs = (tokens[:-1] * 10 + tokens[1:]).bincount(minlength=100)
    expected = (len(tokens) - 1) / 100
    assert float(((pairs - expected) ** 2 / expected).sum()) < 155  # 99 degrees: 1 in 3000


def test_a_row_does_not_depend_on_its_company_and_can_be_drawn_again():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    seeds, positions = torch.arange(7) * 11, torch.arange(7)
    heat = torch.tensor([0.0, 1, 2, 1, 1, 0.5, 1])
    given = {"temperature": heat, "top_k": torch.arange(7, dtype=torch.int32) * 9}
    together, told = ds_ops.sample_tokens(logits, seeds=seeds, positions=positions, **given)
    for row in range(7):
        own = slice(row, row + 1)
        token, log_probability = ds_ops.sample_tokens(
            logits[own], seeds=seeds[own], positions=positions[own],
            **{name: t[own] for name, t in given.items()},
        )  # fmt: skip
        assert token == together[row]
        assert log_probability == told[row]
    later, _ = ds_ops.sample_tokens(logits, seeds=seeds, positions=positions + 1, **given)
    assert not torch.equal(later, together)


def test_numbers_are_the_same_for_every_row():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    seeds, positions = torch.full((4,), 5), torch.full((4,), 6)
    one = ds_ops.sample_tokens(logits, seeds=5, positions=6, temperature=0.8, top_k=9, top_p=0.9)
    other = ds_ops.sample_tokens(
        logits, seeds=seeds, positions=positions, temperature=torch.full((4,), 0.8),
        top_k=torch.full((4,), 9, dtype=torch.int32), top_p=torch.full((4,), 0.9),
    )  # fmt: skip
    assert torch.equal(one[0], other[0])


def test_without_temperature_the_first_of_the_largest_is_taken():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-2.0, -2.0, -3.0, torch.nan]])
    tokens, told = ds_ops.sample_tokens(logits, seeds=0, positions=0, temperature=0.0)
    assert tokens.tolist() == [1, 0]
    assert told[0] == pytest.approx(float(logits[0].log_softmax(0)[1]))


def greedy(row, **penalties):
    tokens, _ = ds_ops.sample_tokens(
        torch.tensor([row]), seeds=0, positions=0, temperature=0.0, **penalties
    )
    return int(tokens)


def test_penalties_are_those_of_the_field():
    prompt = torch.tensor([[True, False, False]])
    counts = torch.tensor([[0, 3, 0]], dtype=torch.int32)
    # 3 / 2 < 1.6, and -1 * 2 < -1.5: what was seen gets less likely whatever its sign.
    assert greedy([3.0, -9.0, 1.6], repetition_penalty=2.0, prompt_mask=prompt) == 2
    assert greedy([3.0, -9.0, 1.4], repetition_penalty=2.0, prompt_mask=prompt) == 0
    assert greedy([-1.0, -9.0, -1.5], repetition_penalty=2.0, prompt_mask=prompt) == 2
    assert greedy([-9.0, 3.0, 1.6], repetition_penalty=2.0, output_counts=counts) == 2
    # Seen twice, in the prompt and after it, is divided by once.
    both = torch.tensor([[0, 3, 0]], dtype=torch.int32), torch.tensor([[False, True, False]])
    given = {"repetition_penalty": 2.0, "output_counts": both[0], "prompt_mask": both[1]}
    assert greedy([-9.0, 3.0, 1.4], **given) == 1
    # The prompt does not count as put out.
    assert greedy([3.0, 0.0, 2.0], presence_penalty=5.0, prompt_mask=prompt) == 0
    assert greedy([0.0, 3.0, 2.4], presence_penalty=0.5, output_counts=counts) == 1
    assert greedy([0.0, 3.0, 2.6], presence_penalty=0.5, output_counts=counts) == 2
    assert greedy([0.0, 3.0, 1.6], frequency_penalty=0.5, output_counts=counts) == 2
    assert greedy([0.0, 3.0, 1.4], frequency_penalty=0.5, output_counts=counts) == 1


def test_log_probabilities_are_those_of_the_logits_as_given():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    tokens, told = ds_ops.sample_tokens(
        logits, seeds=1, positions=2, temperature=3.0, top_k=7, repetition_penalty=1.5,
        prompt_mask=torch.ones(5, 40, dtype=torch.bool),
    )  # fmt: skip
    expected = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(told, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 1.5}, r"seeds: got 1\.5, expected an integer"),
        ({"top_k": 2.5}, r"top_k: got 2\.5, expected an integer or torch\.int32"),
        ({"top_p": "most"}, r"top_p: got most, expected a number or torch\.float32"),
        ({"temperature": math.nan}, "temperature: got nan, expected a number"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty: got 0\.0, expected more than 0"),
        ({"logits": None}, "logits: got None, expected a tensor"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings, message):
    given = {"logits": torch.zeros(2, 5), "seeds": 1, "positions": 0} | settings
    with pytest.raises(OpError, match=f"sample_tokens: {message}"):
        ds_ops.sample_tokens(given.pop("logits"), **given)
