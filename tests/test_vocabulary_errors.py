"""Wrong arguments of the ops on rows of a vocabulary: the same exception type and text from every backend."""

import pytest
import torch

import rewardfuse
import vocabulary_errors
from vocabulary_errors import VOCABULARY_CASES


@pytest.mark.parametrize(("call", "kind", "text"), VOCABULARY_CASES, ids=[text[:60] for *_, text in VOCABULARY_CASES])
def test_error_of_another_type_or_text(backend, call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).splitlines()[0] == text


@pytest.mark.parametrize("call", [vocabulary_errors.kl, vocabulary_errors.kl_hidden], ids=["logits", "hidden"])
def test_an_unknown_option_is_swallowed(backend, call):
    with pytest.raises(TypeError, match="whitening"):
        call(whitening=True)()


@pytest.mark.parametrize("estimator", ["k1", "full"])
def test_a_wrong_argument_is_found_after_the_work(backend, monkeypatch, estimator):
    """What is wrong beside the logits is said before they are read."""

    def work(*_):
        raise AssertionError("the logits were read")

    from rewardfuse import _backend

    namespace = _backend.namespace_for(vocabulary_errors.LOGITS, "token_logprobs")
    for name in ("token_logprobs", "_token_logprobs_forward"):
        monkeypatch.setattr(namespace, name, work)
    for changes in (
        {"kl_coef": torch.tensor(-1.0)},
        {"scores": torch.zeros(3)},
        {"ended": torch.ones(3, dtype=torch.bool), "missing_eos_penalty": 1.0},
    ):
        for call in (vocabulary_errors.kl, vocabulary_errors.kl_hidden):
            with pytest.raises(ValueError):
                call(estimator=estimator, **changes)()


@pytest.mark.parametrize("estimator", ["k1", "full"])
def test_a_row_without_reason_raises_for_a_masked_token(backend, estimator):
    """Tokens and temperatures at masked places may be anything."""
    mask = torch.tensor([[True, False, True], [False, True, False]], device=backend.device)
    tokens = torch.where(mask, 1, torch.tensor([-100, -1, 5], device=backend.device))
    temperature = torch.where(mask, 1.0, torch.tensor([0.0, torch.nan, -1.0], device=backend.device))
    logits = torch.randn(2, 3, 5, device=backend.device)
    given = {"temperature": temperature, "estimator": estimator, "kl_coef": 0.1}
    result = rewardfuse.kl_penalized_rewards_from_logits(logits, logits + 1, tokens, mask, **given)
    assert result.kl.isfinite().all() and (result.logprobs[~mask] == 0).all()
    states, weight = torch.randn(2, 3, 4, device=backend.device), torch.randn(5, 4, device=backend.device)
    result = rewardfuse.kl_penalized_rewards_from_hidden(states, weight, -states, weight, tokens, mask, **given)
    assert result.kl.isfinite().all() and (result.logprobs[~mask] == 0).all()
