"""Next-token cross-entropy from hidden states and head, in chunks of positions. Shape legend: interfaces.py."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.interfaces import LossFn
from jaxtrain.losses.chunks import CHUNK_TOKENS, NEVER, Arrays, ChunkFn, Sums, Vocabulary, chunked_loss


@dataclasses.dataclass(kw_only=True)
class CrossEntropy:
    """Cross-entropy in nats, optionally with z-loss.

    Attributes:
        z_loss: Weight of log(Z)², where Z is the softmax normalizer. It keeps logits from drifting (PaLM, arXiv
            2204.02311, section 5, uses 1e-4). 0 turns it off.
        chunk_tokens: The most positions whose logits exist at once on a device; they take about 8 bytes * chunk_tokens
            * vocabulary / mesh.tensor. Each chunk also reads and writes dw in fp32. By the published peaks of an H200
            and a TPU v5p (an estimate, not measured) that takes as long as the matrix products of about 220 positions,
            so chunks well below 1,000 positions should be slow there. None: the trainer chooses (trainer/tuning.py);
            outside of it, 1024.
    """

    z_loss: float = 0.0
    chunk_tokens: int | None = dataclasses.field(default=None, metadata={cli.BEFORE: CHUNK_TOKENS})

    def check(self) -> None:
        """Raises UserError if a value is out of range."""
        if self.z_loss < 0:
            raise UserError(f"z_loss={self.z_loss}: give a weight of 0 or more (PaLM uses 1e-4).")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise UserError(f"chunk_tokens={self.chunk_tokens}: give at least one position (1024 is usual).")

    def build(self, vocab_size: int, mesh: Mesh | None) -> LossFn:
        """Builds the loss: "loss" = "ce_loss" + "z_loss" (omitted if its weight is 0)."""
        return chunked_loss(self.chunk_fn(vocab_size), mesh, self.chunk_tokens or CHUNK_TOKENS)

    def chunk_fn(self, vocab_size: int) -> ChunkFn:
        """Builds the loss of one chunk of logits. Distillation adds its divergence to it.

        Args:
            vocab_size: Columns from here on are padding.

        Returns:
            (logits_CV, vocabulary, targets_C, mask_C, weight) -> (sums, gradient of sums["loss"] with respect to the
            logits). In "loss" the weight multiplies the cross-entropy but not the z-loss.
        """

        def chunk(
            logits_CV: jax.Array,
            vocabulary: Vocabulary,
            targets_C: jax.Array,
            mask_C: jax.Array,
            weight: jax.Array | float = 1.0,
        ) -> tuple[Sums, jax.Array]:
            logits_CV, _, log_z_C, target_logit_C = softmax_terms(logits_CV, vocabulary, targets_C, vocab_size)
            sums = {"ce_loss": jnp.where(mask_C, log_z_C - target_logit_C, 0.0).sum()}
            sums["loss"] = weight * sums["ce_loss"]
            if self.z_loss:
                sums["z_loss"] = jnp.where(mask_C, self.z_loss * log_z_C**2, 0.0).sum()
                sums["loss"] += sums["z_loss"]
            # d log Z / d logits = softmax, so the z-loss only scales the softmax.
            softmax_CV = jnp.exp(logits_CV - log_z_C[:, None])
            is_target_CV = vocabulary.columns == targets_C[:, None]
            dlogits_CV = softmax_CV * (weight + 2 * self.z_loss * log_z_C)[:, None] - weight * is_target_CV
            return sums, jnp.where(mask_C[:, None], dlogits_CV, 0.0)

        return chunk


def softmax_terms(logits_CV: jax.Array, vocabulary: Vocabulary, targets_C: jax.Array, vocab_size: int) -> Arrays:
    """Returns logits_CV without its padding, their maximum, log(Z), and the targets' logits; the last three [C].

    Args:
        logits_CV: Logits of a chunk, fp32.
        vocabulary: The device's slice of the vocabulary.
        targets_C: Ids.
        vocab_size: Columns from here on are padding.
    """
    logits_CV = jnp.where(vocabulary.columns < vocab_size, logits_CV, NEVER)
    max_C = vocabulary.max(logits_CV.max(axis=1))
    z_C = jnp.exp(logits_CV - max_C[:, None]).sum(axis=1)
    z_C, target_logit_C = vocabulary.sum(jnp.stack([z_C, vocabulary.pick(logits_CV, targets_C)]))
    return logits_CV, max_C, jnp.log(z_C) + max_C, target_logit_C
