"""What commands of the pages find when they start, all of it tiny, and how they are shortened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import BertConfig, BertModel, BertTokenizerFast

from scripts import pretrain, train_contrastive

TOY = "soft_moe_vit_test_patch16_64"
TEXT = ["--text.width=16", "--text.heads=2", "--text.layers=1"]  # of open_clip's transformer
# The length of every run, whatever the page says.
LENGTH = [
    "--train.steps=2", "--train.log_every=1", "--train.eval_every=0", "--train.threads=1",
    "--train.accumulation=1", "--train.precision=fp32", "--schedule.warmup_steps=0",
    "--schedule.cooldown_steps=0", "--evaluation=[]", "--data.workers=0",
]  # fmt: skip


class World:
    """A folder with shards, from which runs and sets are made when a page asks for them."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards
        self.makers: dict[str, Callable[[Path], None]] = {
            "encoder": self._encoder, "experts": self._experts, "pairs": self._pairs,
            "bert": self._bert, "set": self._set,
        }  # fmt: skip

    def get(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            self.makers[name](path)
        return path

    def small(self, module: str, given: list[str]) -> list[str]:
        """What a command of a page has to be told besides, to run here within seconds."""
        names = {word.partition("=")[0] for word in given}
        settings = {
            "scripts.pretrain": self._pretrain_settings,
            "scripts.train_contrastive": self._pairs_settings,
            "scripts.cache_embeddings": self._pairs_settings,
        }.get(module)
        if settings is None:
            return ["--threads=1"] if module == "scripts.evaluate" else []
        own = [word for word in settings() if word.partition("=")[0] not in names]
        if "configs/frozen_text.yaml" in given:
            own = [word for word in own if word not in TEXT]
        return [*own, *LENGTH]

    def _pretrain_settings(self) -> list[str]:
        return [
            f"--model.name={TOY}", f"--data.shards={self.shards}/*.tar",
            f"--data.classnames={self.shards}/classnames.txt", "--train.batch_size=8",
        ]  # fmt: skip

    def _pairs_settings(self) -> list[str]:
        return [
            f"--image.name={TOY}", f"--data.shards={self.shards}/*.tar", "--train.batch_size=8",
            "--contrastive.embed_dim=8", "--text.context_length=8", *TEXT,
        ]  # fmt: skip

    def _encoder(self, path: Path) -> None:
        pretrain.main([f"--run_dir={path}", *self.small("scripts.pretrain", [])])

    def _experts(self, path: Path) -> None:
        arguments = '--model.arguments={"router": "experts_choice", "num_experts": 4}'
        pretrain.main([f"--run_dir={path}", arguments, *self.small("scripts.pretrain", [])])

    def _pairs(self, path: Path) -> None:
        options = [f"--run_dir={path}", f"--image.init_from={self.get('encoder')}"]
        train_contrastive.main([*options, *self.small("scripts.train_contrastive", [])])

    def _bert(self, folder: Path) -> None:
        folder.mkdir()
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
        (folder / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(vocab_size=len(words), intermediate_size=32, **sizes)
        BertModel(config).save_pretrained(folder)

    def _set(self, path: Path) -> None:
        """In CLIP_benchmark's layout."""
        for split, shard in (("train", "train-0.tar"), ("test", "train-1.tar")):
            (path / split).mkdir(parents=True)
            shutil.copy(self.shards / shard, path / split / "0.tar")
        shutil.copy(self.shards / "classnames.txt", path)
        (path / "zeroshot_classification_templates.txt").write_text("a {c} square\n")
