"""Our models in `mteb`, whose MIEB benchmarks are the standard table of image embeddings.

Needs the extra `mteb`; nothing else of this project imports this module.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from eval.subject import Subject

TEXT, IMAGE = "text", "image"


class MtebEncoder(AbsEncoder):
    """A subject as `mteb.evaluate` takes it.

    Where a task gives texts and images together, the embedding is the sum of both, as in mteb's own
    open_clip models. An image encoder without a text tower embeds images by its features.

    Args:
        subject: from `open_subject`; pictures are resized as the model was trained with.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject.for_set(None)
        self.mteb_model_meta = model_meta(self.subject)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Embeddings float32 (rows, d) as a numpy array.

        Args:
            inputs: a loader of batches {"text": strings, "image": PIL images}, one of them or both.
            task_metadata: what else mteb tells, as the next ones; embeddings do not depend on it.
            hf_split: likewise.
            hf_subset: likewise.
            prompt_type: likewise.
            **kwargs: likewise.

        Raises:
            ValueError: texts for a model without a text tower, or batches with neither.
        """
        return torch.cat([self._batch(batch) for batch in inputs]).numpy()

    def _batch(self, batch: dict[str, Any]) -> Tensor:
        parts = []
        if TEXT in batch:
            if self.subject.encode_text is None:
                raise ValueError(f"model '{self.subject.name}' has no text tower")
            parts.append(self.subject.encode_text(list(batch[TEXT])))
        if IMAGE in batch:
            encode = self.subject.encode_image or self.subject.features
            parts.append(encode(self._pixels(batch[IMAGE])))
        if not parts:
            raise ValueError(f"a batch holds neither text nor image but {', '.join(batch)}")
        return torch.stack(parts).sum(0)

    def _pixels(self, images: Iterable[Any]) -> Tensor:
        return torch.stack(
            [self.subject.transform(pil_to_tensor(image.convert("RGB"))) for image in images]
        )


def model_meta(subject: Subject) -> ModelMeta:
    """How mteb names a subject in its results, which it keeps by name and revision.

    The revision is a hash of all that embeddings depend on besides the inputs: weights,
    architecture and tokens, precision and preprocessing.
    """
    parts = [subject.identity.fingerprint, subject.precision, subject.preprocess]
    revision = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", subject.name).strip("-")
    parameters = sum(p.numel() for p in subject.identity.model.parameters())
    return ModelMeta(
        loader=None,
        name=f"softmoe-clip/{name}",
        revision=revision[:40],
        release_date=None,
        languages=None,
        n_parameters=parameters,
        memory_usage_mb=None,
        max_tokens=None,
        embed_dim=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=[IMAGE, TEXT] if subject.encode_text is not None else [IMAGE],
    )
