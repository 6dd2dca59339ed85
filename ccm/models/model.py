"""A checkpoint that is ready to run, and the stored weights that the method reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ccm.errors import BadInput, reason_of
from ccm.method.neurons import FinalNorm
from ccm.method.prompts import Chat, Turns
from ccm.models.specs import MAX_NEW_TOKENS, ModelSpec


@dataclass(frozen=True)
class LastLayer:
    """The stored weights between the last MLP's activations and the logits."""

    W_out: Float[Tensor, "d_mlp d_model"]
    norm: FinalNorm
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, "d_vocab"]


@dataclass
class LoadedModel:
    """A checkpoint that is ready to run, and the stored weights that the method reads."""

    spec: ModelSpec
    bridge: Any  # transformer_lens TransformerBridge, for the hooked engine
    body: Any  # the same weights as a plain transformers model without its head, for the shared engine
    mlp: Any  # `body`'s last MLP
    mlp_out: Any  # `body`'s last down-projection; its input is `hook_post`
    norm: Any  # `body`'s final norm; its input is the final residual
    tokenizer: Any  # transformers fast tokenizer
    device: torch.device
    dtype: torch.dtype
    source: str  # folder or hub id the weights came from
    n_ctx: int
    bos: int | None  # the one token in front of every prompt, if any
    eos: frozenset[int]  # decoding stops at any of these
    special_tokens: Mapping[str, Any] = field(default_factory=dict)  # where BOS and EOS were found
    provisional_tokens: Bool[Tensor, "d_vocab"] | None = None  # filled by `decoding.shared`
    float32_error: Any = None  # filled by `decoding.tolerance`
    trial: Any = None  # a `Trial` of `ccm.models.trial`, which the shared engine is compared with
    narrow: bool = True  # whether the last MLP can run at some positions only; set by `decoding.trial`
    broken_assumption: str = ""  # found by `ccm.models.assumptions`: why only hooks ablate it correctly

    @property
    def hook_post(self) -> str:
        """Name of the hook after the last layer's MLP non-linearity."""
        return f"blocks.{self.spec.n_layers - 1}.mlp.hook_post"

    @cached_property
    def final_norm(self) -> FinalNorm:
        """The norm before the unembedding."""
        module = self.bridge.ln_final
        weight: Tensor | None = getattr(module, "weight", None)
        gain = torch.ones(self.spec.d_model, device=self.device)  # OLMo's norm has no weight
        gain = gain if weight is None else weight.detach().float().to(self.device)
        if getattr(self.bridge.cfg, "rmsnorm_uses_offset", False):
            gain = gain + 1.0
        bias = getattr(module, "bias", None)
        return FinalNorm(
            centred=not bool(self.bridge.cfg.uses_rms_norm),
            eps=float(self.bridge.cfg.eps),
            gain=gain,
            bias=torch.zeros_like(gain) if bias is None else bias.detach().float().to(self.device),
        )

    def logits(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_vocab"]:
        """Compute the logits of final residuals, in float32."""
        found: Tensor = self.final_norm(x.float()) @ self.W_U.float() + self.b_U
        return found

    @cached_property
    def last_layer(self) -> LastLayer:
        """The weights between the last MLP's activations and the logits."""
        return LastLayer(self.W_out, self.final_norm, self.W_U, self.b_U)

    @cached_property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding as stored (not folded, not centred), in the model's dtype."""
        weight: Tensor = self._head.weight
        return weight.detach().T.to(self.device)

    @cached_property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """The unembedding's own bias, float32; zeros if the model has none."""
        bias: Tensor | None = self._head.bias
        if bias is None:
            return torch.zeros(self.W_U.shape[1], device=self.device)
        return bias.detach().float().to(self.device)

    @cached_property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """The last MLP's output weights, a row per neuron, in the model's dtype."""
        return self.output_weights(self.spec.n_layers - 1)

    def output_weights(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Read a layer's MLP output weights, a row per neuron, in the model's dtype.

        They are a view of the weights if these lie on the model's device, else a copy.

        Args:
            layer: Its number, from 0.

        Raises:
            AttributeError: the layer's MLP has no single output matrix (experts).
        """
        module = self.bridge.blocks[layer].mlp.out.original_component
        weight: Tensor = module.weight.detach().to(self.device)
        # transformers' Conv1D (GPT-2) stores [in, out], nn.Linear [out, in].
        return weight if type(module).__name__ == "Conv1D" else weight.T

    @property
    def _head(self) -> Any:
        return self.bridge.unembed.original_component

    @property
    def chat(self) -> Chat | None:
        """The tokenizer's own markup of a conversation; None if it has no chat template.

        The template is rendered by transformers, in Jinja's sandbox. A BOS token that it puts in front
        is removed, because `encode` adds it.

        Raises:
            BadInput: a template that writes today's date, so that prompts would change every day.
        """
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            return None
        if "strftime_now" in str(template):
            raise BadInput(
                f"--template own: the chat template of {self.spec.name} writes today's date, so "
                "tomorrow's prompts would differ. Use --template instruction."
            )
        return self._in_own_markup

    def _in_own_markup(self, turns: Turns) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything
            raise BadInput(
                f"--template own: the chat template of {self.spec.name} cannot be used "
                f"({reason_of(error)}). Use --template instruction."
            ) from error
        if self.bos is not None and self.bos == self.tokenizer.bos_token_id:
            text = text.removeprefix(self.tokenizer.bos_token)
        return text

    def encode(self, text: str) -> list[int]:
        """Encode a text, with the model's BOS in front if it has one.

        Raises:
            BadInput: no token at all, a token that the model does not have, or more tokens than its
                context leaves room for.
        """
        start = [] if self.bos is None else [self.bos]
        ids = [*start, *self.tokenizer.encode(text, add_special_tokens=False)]
        # The last generated token is never fed back.
        room = self.n_ctx - (MAX_NEW_TOKENS - 1)
        if not 0 < len(ids) <= room:
            raise BadInput(
                f"prompt of {len(ids)} tokens ({text[:40]!r}...): {'too long' if ids else 'empty'}. "
                f"Allowed: 1 to {room}, the context of {self.spec.name} ({self.n_ctx}) less its answer."
            )
        return self._known(ids, text)

    def _known(self, ids: list[int], text: str) -> list[int]:
        """Check that the model has all tokens, because a tokenizer may have more."""
        if max(ids) >= self.spec.d_vocab:
            raise BadInput(
                f"{text[:40]!r}: holds token {max(ids)} of the tokenizer, but {self.spec.name} has "
                f"{self.spec.d_vocab} tokens. Leave it out of the text."
            )
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Turn generated tokens into text, without special tokens."""
        return str(
            self.tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def decode_all(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Turn several continuations into text, each as `decode` does."""
        if not tokens:
            return []  # transformers takes an empty list for one empty continuation
        return self.tokenizer.batch_decode(  # type: ignore[no-any-return]
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def first_token(self, answer: str) -> int:
        """Return the id of the first token of `answer` when it follows a space (Method 9).

        The answer is encoded after a word, whose tokens are then removed. So neither a BOS that the
        tokenizer adds nor a token that is a bare space can be mistaken for it (defect 7).

        Raises:
            BadInput: the answer has no token of its own, or one that the model does not have.
        """
        word = self.tokenizer.encode("is", add_special_tokens=False)
        both = self.tokenizer.encode(f"is {answer.strip()}", add_special_tokens=False)
        if not answer.strip() or both[: len(word)] != word or len(both) == len(word):
            raise BadInput(f"answer {answer!r} has no token of its own. Use another object name.")
        return self._known(both, answer)[len(word)]
