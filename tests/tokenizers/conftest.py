"""Real text, and one tokenizer of each kind trained on it, for all tests here."""

import json
import pathlib
import sysconfig
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from jaxtrain.tokenizers.hf import HFTokenizer, HuggingFaceTokenizer
from jaxtrain.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxtrain.tokenizers.training import TrainTokenizer

TRAINED = {
    "unigram": TrainTokenizer(vocab_size=600),
    "sentencepiece-bpe": TrainTokenizer(vocab_size=1000, model_type="bpe"),
    "bpe": TrainTokenizer(vocab_size=1000, kind="bpe", engine="tokenizers"),
}
KINDS = (*TRAINED, "byte-fallback json")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def standard_library(size: int) -> list[str]:
    """The first modules of the running Python, by name, up to this many bytes."""
    texts = []
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        texts.append(path.read_text(encoding="utf-8"))
        size -= len(texts[-1])
        if size < 0:
            break
    return texts


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return standard_library(300_000)


@pytest.fixture(scope="session")
def workdirs(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A work directory with a trained tokenizer for each kind in TRAINED."""
    made = {}
    for kind, config in TRAINED.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        config.train(documents, made[kind], progress=False)
    return made


@pytest.fixture(scope="session")
def json_folder(workdirs: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tokenizer.json like those of Llama 2 and Mistral, with settings that training must not have."""
    model = str(workdirs["sentencepiece-bpe"] / "tokenizer" / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    vocabulary = {processor.id_to_piece(id): id for id in range(processor.vocab_size())}
    cuts = [(piece[:cut], piece[cut:]) for piece in vocabulary for cut in range(1, len(piece))]
    merges = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["jaxtrain!"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8, pad_token="<unk>")
    folder = tmp_path_factory.mktemp("json")
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    eos = {"__type": "AddedToken", "content": "</s>", **flags}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "bos_token": "<s>"}))
    return folder


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, workdirs: dict[str, pathlib.Path], json_folder: pathlib.Path) -> Any:
    """Each kind in turn."""
    return load(request.param, workdirs, json_folder)


def load(
    kind: str, workdirs: dict[str, pathlib.Path], json_folder: pathlib.Path
) -> HFTokenizer | SentencePieceTokenizer:
    if kind in TRAINED:
        return TRAINED[kind].build(workdirs[kind])
    return HuggingFaceTokenizer(name=str(json_folder)).build("")
