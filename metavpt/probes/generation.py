"""Continuations of prompts by a language model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from metavpt.data.lazy import runs
from metavpt.data.loader import mix
from metavpt.data.tokens import Encoder
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.learners.lm import LanguageModel


class Generator:
    """Continues prompts in batches, with left padding and a key-value cache.

    A continuation ends at EOS, at a text of `stop`, or after `max_new_tokens`.

    Args:
        encoder: Tokenises the prompts.
        max_new_tokens: The limit on generated tokens.
        batch_size: Prompts per batch.
        stop: Texts that end a continuation.

    Raises:
        MetaVPTError: `max_new_tokens` or `batch_size` is not positive.
    """

    def __init__(
        self,
        encoder: Encoder,
        max_new_tokens: int = 256,
        batch_size: int = 64,
        stop: Sequence[str] = ("Question:",),
    ) -> None:
        if max_new_tokens < 1 or batch_size < 1:
            raise MetaVPTError(
                f"generation: max_new_tokens={max_new_tokens} and batch_size={batch_size} must be "
                "positive"
            )
        self.encoder, self.stop = encoder, list(stop)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def __call__(
        self,
        learner: LanguageModel,
        prompts: Sequence[str],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Return the continuation of each prompt, in order, without the stop text.

        Ranks share the batches. The global random state is unchanged: the samples of a batch depend
        only on `seed` and the place of the batch.

        Args:
            learner: The language model.
            prompts: Texts.
            temperature: 0: greedy. Otherwise samples of the full softmax, whatever generation
                settings the model was released with.
            seed: The seed of the samples.

        Raises:
            MetaVPTError: A prompt and `max_new_tokens` exceed the context of the model.
        """
        device = next(learner.parameters()).device
        tokens = self._tokens(learner, prompts)
        # Batches of prompts of similar length need little padding.
        order = sorted(range(len(tokens)), key=lambda k: len(tokens[k]))

        def write(batch: tuple[int, Sequence[int]]) -> list[str]:
            number, which = batch
            torch.manual_seed(mix(seed, number))
            return list(self._continue(learner, [tokens[k] for k in which], temperature, device))

        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            batches = list(enumerate(runs(order, self.batch_size)))
            written = [text for texts in collectives.share_out(write, batches) for text in texts]
        return [text for _, text in sorted(zip(order, written, strict=True))]

    def _tokens(self, learner: LanguageModel, prompts: Sequence[str]) -> list[list[int]]:
        """Tokenise the prompts as `Encoder` does in front of an answer."""
        encoded = self.encoder.tokenizer(
            list(prompts), split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        tokens = [
            ids[:-1] if ids[-1:] == [self.encoder.eos] else ids for ids in encoded["input_ids"]
        ]  # type: ignore[union-attr]
        longest = max(map(len, tokens))
        if longest + self.max_new_tokens > learner.max_length:
            raise MetaVPTError(
                f"generation: a prompt of {longest} tokens and "
                f"max_new_tokens={self.max_new_tokens} do not fit into the context of "
                f"{learner.max_length}; lower max_new_tokens, or leave long questions out"
            )
        return tokens

    @torch.no_grad()
    def _continue(
        self,
        learner: LanguageModel,
        prompts: list[list[int]],
        temperature: float,
        device: torch.device,
    ) -> Iterator[str]:
        tokens, mask = left_padded(prompts, self.encoder.pad)
        model, tokenizer = learner.transformers_model, self.encoder.tokenizer
        # generate() would fill the gaps of our configuration from the released one.
        released, model.generation_config = model.generation_config, self._config(temperature)
        try:
            options: dict[str, Any] = (
                {"stop_strings": self.stop, "tokenizer": tokenizer} if self.stop else {}
            )
            # A sharded model gathers its weights at every token, so no rank may stop first.
            out = model.generate(
                tokens.to(device),
                attention_mask=mask.to(device),
                synced_gpus=collectives.size() > 1,
                **options,
            )
        finally:
            model.generation_config = released
        for text in tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True):
            for stop in self.stop:
                text = text.partition(stop)[0]
            yield text

    def _config(self, temperature: float) -> GenerationConfig:
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.encoder.pad,
            eos_token_id=self.encoder.eos,
            use_cache=True,
            **sampling,
        )


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, int64 (B, T). Every prompt ends in the last column."""
    length = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask
