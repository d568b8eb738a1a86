"""When a model is loaded, this file tests on a few tokens that sampling and log-probs will be right for this model.

The commands pass `check_model` to model.load_model. The last test of `check_model`, choose_loop (fast/decode.py),
looks for the fastest decoding loop with the right log-probs. If no loop of fast/decode.py gives the right log-probs,
HuggingFace's loop is used.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from fast.decode import choose_loop
from model import response_stats
from support.errors import InputError
from support.loading import one_line


@torch.no_grad()
def check_model(path: str, model: PreTrainedModel, training: bool) -> None:
    """Test on a few tokens that sampling and log-probs will be right for `model`, and set model.loop to the fastest
    decoding loop that is right.

    Raises an InputError of one line unless three conditions hold. (1) The logits are finite and equal the outputs of
    the model's head, to the bit. (2) Two training passes over the same tokens agree up to the last bits, in which two
    products of the same matrices may differ. (3) A row in a padded batch has the log-probs that the row has alone in
    a plain forward pass, in training and in sampling, to half the digits of the dtype. The test batch has three rows
    that end at different columns.
    """
    step, column = model.get_input_embeddings().num_embeddings // 19, torch.arange(13)
    # the columns of the first and the last token in each of the test batch's three rows
    first, last = torch.tensor([[0], [4], [0]]), torch.tensor([[12], [8], [10]])
    mask = ((column >= first) & (column <= last)).long().to(model.device)
    prompts, responses = torch.arange(1, 8).expand(3, 7), torch.arange(1, 19).view(3, 6)
    ids = (step * torch.cat([prompts, responses], dim=1)).to(model.device)
    want = torch.zeros(responses.shape, device=model.device)
    made: list[Tensor] = []  # the outputs of the model's head, one per call of the head
    head = model.eval().get_output_embeddings()
    with one_line(path), head.register_forward_hook(lambda *call: made.append(call[-1].clone())):
        for i, real in enumerate(mask.bool()):
            logits = model(input_ids=ids[i : i + 1, real], use_cache=False).logits
            if not logits.isfinite().all():
                raise InputError("the logits are not finite, so the weights are damaged: fetch or train them again")
            if not torch.equal(made[-1].float(), logits.float()):
                raise InputError("the logits are not the outputs of the head (scaled or capped?): use another model")
            log_p = logits[0, -int(real[7:].sum()) - 1 : -1].float().log_softmax(-1)
            want[i, real[7:]] = log_p.gather(1, ids[i, 7:][real[7:], None]).squeeze(1)
        close = float(want.abs().max()) * torch.finfo(model.dtype).eps ** 0.5
        passes = [response_stats(model.train(), ids, mask, 6, 1.0)[0] for _ in range(1 + training)]
        if not torch.allclose(passes[0], passes[-1], rtol=0, atol=close / 64):
            raise InputError("two training passes differ: set each dropout or noise in the model's config.json to 0")
        if not torch.allclose(passes[0], want, rtol=0, atol=close):
            raise InputError(
                "log-probs of training differ from a plain forward pass (scaled, not causal?): use another model"
            )
        if not choose_loop(model.eval(), ids, mask, want, close):
            raise InputError("rows sampled in a batch differ from rows alone (a recurrent state?): use another model")
        if model.loop is None:
            logging.get_logger("transformers").warning(f"{path}: transformers' own, slower loop samples it")
