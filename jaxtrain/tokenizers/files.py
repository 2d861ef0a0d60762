"""The files of a tokenizer: from a folder or the Hub, to a folder, and the special tokens that they name."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping

from etils import epath

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
# Those of the language model: read for their special tokens, not saved again.
MODEL_CONFIGS = ("config.json", "generation_config.json")
_NAMES = (
    TOKENIZER_JSON,
    SENTENCEPIECE_MODEL,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.vocab",
    *MODEL_CONFIGS,
)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """where: the folder, file or repository, for messages; content: name → bytes; revision: the Hub's commit."""

    where: str
    content: Mapping[str, bytes]
    revision: str | None = None

    def json(self, name: str) -> Json:
        """The content of a JSON file; {} if there is none."""
        if name not in self.content:
            return {}
        try:
            return json.loads(self.content[name])
        except ValueError as error:
            raise UserError(f"{self.where}: {name} is not JSON ({error}); get the file again") from error


def find(name: str, revision: str | None) -> TokenizerFiles:
    """The files of a folder or file (local, gs://, s3://), or else of a repository of the Hub. Raises UserError."""
    path = epath.Path(name).expanduser()
    if path.exists():
        return read(path)
    if "://" in name or name.startswith(("/", ".", "~")):
        raise UserError(f"tokenizer name={name!r}: no such folder or file; give a folder, a file or an id of the Hub")
    return _download(name, revision)


def read(path: epath.Path) -> TokenizerFiles:
    """The files of a folder; or one file, whatever it is called, and the configs next to it."""
    if path.is_dir():
        content = {name: (path / name).read_bytes() for name in _NAMES if (path / name).exists()}
    else:
        model = TOKENIZER_JSON if path.suffix == ".json" else SENTENCEPIECE_MODEL
        configs = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, *MODEL_CONFIGS)
        content = {name: (path.parent / name).read_bytes() for name in configs if (path.parent / name).exists()}
        content[model] = path.read_bytes()
    return TokenizerFiles(os.fspath(path), content)


def _download(name: str, revision: str | None) -> TokenizerFiles:
    # Imported here, as it takes 0.3 s, and most runs bring or train their own tokenizer.
    from huggingface_hub import errors, snapshot_download

    try:
        # Resolves the revision to a commit once, and gives the cached commit where the Hub cannot be reached.
        folder = snapshot_download(name, revision=revision, allow_patterns=list(_NAMES))
    except errors.GatedRepoError as error:
        raise UserError(
            f"tokenizer name={name!r} is gated: accept its terms on its page, then set HF_TOKEN (or `hf auth login`)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"tokenizer name={name!r}: neither a local folder or file nor a repository of the Hub that you may read; "
            "check the spelling, or set HF_TOKEN if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"tokenizer name={name!r} has no revision={revision!r}; give a branch, tag or commit"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"tokenizer name={name!r} is neither a local folder or file nor a Hub id: {error}") from error
    commit = os.path.basename(os.path.normpath(folder))
    return TokenizerFiles(f"{name} (commit {commit})", read(epath.Path(folder)).content, commit)


def write(content: Mapping[str, bytes], folder: epath.PathLike) -> None:
    """Writes the files into a folder, which may hold others."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)


def is_local(folder: epath.PathLike) -> bool:
    """Whether it is on a file system, not gs:// or s3://."""
    return "://" not in os.fspath(folder)


def publish(content: Mapping[str, bytes], folder: epath.PathLike) -> None:
    """Writes a new folder such that a kill at any moment leaves either none of it, or (on an object store, which has
    no renaming) not the last of the files.
    """
    folder = epath.Path(folder)
    if not is_local(folder):
        write(content, folder)
        return
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        partial.rmtree()
    write(content, partial)
    # Onto an empty folder too; one that holds anything is refused by the system.
    os.replace(partial, folder)


def special_id(
    files: TokenizerFiles, kind: str, token: str | None, vocab_size: int, token_to_id: Callable[[str], int | None]
) -> int | None:
    """The id of the "eos" or "bos" token, or None if the files name none. Raises UserError for one without an id.

    token: the user's choice, if any. The tokenizer's own configs come first (null there means that it has none, but an
    end of document is needed, so it is looked for further); then the ids in the model's configs, of which the first
    counts if there are several.
    """
    name = f"{kind}_token"
    source = f"{name}={token!r}"
    if token is None:
        named = {
            file: files.json(file)[name] for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP) if name in files.json(file)
        }
        if kind == "eos":
            named = {file: value for file, value in named.items() if value is not None}
        if not named:
            return _model_config_id(files, name, vocab_size)
        file, value = next(iter(named.items()))
        token = value["content"] if isinstance(value, dict) else value
        source = f"{file}'s {name} {token!r}"
    if token is None:
        return None
    found = token_to_id(token)
    if found is None:
        raise UserError(f"{files.where}: {source} is not in its vocabulary; set `{name}` to a token that is")
    return found


def _model_config_id(files: TokenizerFiles, name: str, vocab_size: int) -> int | None:
    for file in MODEL_CONFIGS:
        ids = files.json(file).get(f"{name}_id")
        found = ids[0] if isinstance(ids, list) else ids
        if found is not None and found >= vocab_size:
            raise UserError(
                f"{files.where}: {file}'s {name}_id {found} is not among the {vocab_size} ids; set `{name}`"
            )
        if found is not None:
            return found
    return None


def content_to_save(files: TokenizerFiles, tokens: Mapping[str, str | None]) -> dict[str, bytes]:
    """The tokenizer's files, with a config from which transformers' AutoTokenizer loads the same special tokens.

    tokens: "eos_token" and so on → token.
    """
    content = {name: data for name, data in files.content.items() if name not in MODEL_CONFIGS}
    config = files.json(TOKENIZER_CONFIG)
    # The class that takes tokenizer.json and tokenizer.model as they are: those named after models add rules of theirs.
    complete = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    for name, token in tokens.items():
        known = config.get(name)
        if token != (known["content"] if isinstance(known, dict) else known):
            complete[name] = token
    content[TOKENIZER_CONFIG] = json.dumps(complete, indent=2, ensure_ascii=False).encode() + b"\n"
    return content
