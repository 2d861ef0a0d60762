"""Tokenizer files: finding and reading them, their special tokens, and saving them."""

import dataclasses
import json
import os
from collections.abc import Mapping

from etils import epath

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_CONFIGS = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, MODEL_CONFIG, GENERATION_CONFIG)
_NAMES = (
    TOKENIZER_JSON,
    SENTENCEPIECE_MODEL,
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.vocab",
    *_CONFIGS,
)
# Keys that older models keep in config.json and newer ones in generation_config.json.
_GENERATION_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p"),
    "repetition_penalty",
)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's files in memory.

    Attributes:
        where: folder, file or repository, for messages.
        content: file name to bytes.
        revision: commit on the Hub, if downloaded.
    """

    where: str
    content: Mapping[str, bytes]
    revision: str | None = None

    def json(self, name: str) -> Json:
        """Returns the object in a JSON file; {} if the file is missing.

        Raises:
            UserError: the file does not contain a JSON object.
        """
        if name not in self.content:
            return {}
        try:
            value = json.loads(self.content[name])
        except ValueError as error:
            raise UserError(f"{self.where}: {name} is not JSON ({error}); download the file again") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: {name} is not a JSON object; download the file again")
        return value


def find(name: str, revision: str | None) -> TokenizerFiles:
    """Reads a tokenizer from a folder or file (local, gs://, s3://) if it exists, else from a Hub repository.

    Raises:
        UserError: the folder, file or repository does not exist.
    """
    path = epath.Path(name).expanduser()
    if path.exists():
        return read(path)
    if "://" in name or name.startswith(("/", ".", "~")):
        raise UserError(f"tokenizer name={name!r}: no such folder or file; give a folder, a file or an id of the Hub")
    return _download(name, revision)


def read(path: epath.Path) -> TokenizerFiles:
    """Reads the files of a folder, or one file of any name and the configs next to it."""
    try:
        if path.is_dir():
            content = {name: (path / name).read_bytes() for name in _NAMES if (path / name).exists()}
        else:
            model = TOKENIZER_JSON if path.suffix == ".json" else SENTENCEPIECE_MODEL
            content = {name: (path.parent / name).read_bytes() for name in _CONFIGS if (path.parent / name).exists()}
            content[model] = path.read_bytes()
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"the tokenizer cannot be read: {error}") from error
    return TokenizerFiles(os.fspath(path), content)


def _download(name: str, revision: str | None) -> TokenizerFiles:
    # Imported here: it takes 0.3 s, and most runs use a local or trained tokenizer.
    from huggingface_hub import errors, snapshot_download

    try:
        # Resolves the revision to a commit once. Offline it uses the cached commit.
        folder = snapshot_download(name, revision=revision, allow_patterns=list(_NAMES))
    except errors.GatedRepoError as error:
        raise UserError(
            f"tokenizer name={name!r} is gated: accept its terms on its page, then set HF_TOKEN (or `hf auth login`)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"tokenizer name={name!r}: neither a local folder or file nor a Hub repository that you can read; check "
            "the spelling, or set HF_TOKEN if it is private"
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
    """Writes the files into a folder, which may contain other files."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)


def is_local(folder: epath.PathLike) -> bool:
    """Whether a folder is on a file system rather than in a bucket."""
    return "://" not in os.fspath(folder)


def publish(content: Mapping[str, bytes], folder: epath.PathLike) -> None:
    """Writes a new folder atomically. An object store cannot rename: there the last file marks completion."""
    folder = epath.Path(folder)
    if not is_local(folder):
        write(content, folder)
        return
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        partial.rmtree()
    write(content, partial)
    # Also replaces an empty folder; the OS refuses to replace a non-empty one.
    os.replace(partial, folder)


def special_id(files: TokenizerFiles, name: str, token: str | None, vocabulary: Mapping[str, int]) -> int | None:
    """Finds the id of a special token.

    Search order: the user's choice; the tokenizer's configs, where null means no such token (except for the
    end-of-document token, which is required, so the search continues); the ids in the model's configs, of which the
    first counts.

    Args:
        files: the tokenizer's files.
        name: "eos_token" or "bos_token".
        token: the user's choice, if any.
        vocabulary: token to id.

    Returns:
        The id, or None if no file names the token.

    Raises:
        UserError: the token found is not in the vocabulary.
    """
    source = f"{name}={token!r}"
    for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP) if token is None else ():
        config = files.json(file)
        value = config.get(name)
        if value is None and (name == "eos_token" or name not in config):
            continue
        if value is None:
            return None
        token = value.get("content") if isinstance(value, dict) else value
        source = f"{file}'s {name} {token!r}"
        break
    if token is None:
        return _model_config_id(files, f"{name}_id", vocabulary)
    if not isinstance(token, str) or token not in vocabulary:
        raise UserError(f"{files.where}: {source} is not in its vocabulary; set `{name}` to a token that is")
    return vocabulary[token]


def _model_config_id(files: TokenizerFiles, key: str, vocabulary: Mapping[str, int]) -> int | None:
    for file in (MODEL_CONFIG, GENERATION_CONFIG):
        value = files.json(file).get(key)
        for found in value if isinstance(value, list) else [value]:
            if found is None:
                continue
            if type(found) is not int or found not in set(vocabulary.values()):
                raise UserError(
                    f"{files.where}: {file}'s {key} {found!r} is not among the {len(vocabulary)} ids; "
                    f"set `{key.removesuffix('_id')}`"
                )
            return found
    return None


def content_to_save(
    files: TokenizerFiles, tokens: Mapping[str, str | None], add_bos: bool | None = None
) -> dict[str, bytes]:
    """Returns the tokenizer's files, with a config from which AutoTokenizer loads the same special tokens.

    The model's generation settings are kept with the tokenizer: they name its stop tokens, which exports need.

    Args:
        files: the loaded files.
        tokens: "eos_token", "bos_token", ... to token.
        add_bos: whether transformers begins each text with the BOS token; None keeps the files' setting.

    Returns:
        File name to bytes.
    """
    content = {name: data for name, data in files.content.items() if name != MODEL_CONFIG}
    generation = {key: value for key, value in files.json(MODEL_CONFIG).items() if key in _GENERATION_KEYS}
    if generation and GENERATION_CONFIG not in content:
        content[GENERATION_CONFIG] = _dump(generation)
    config = files.json(TOKENIZER_CONFIG)
    # This class uses tokenizer.json and tokenizer.model unchanged. Model-specific classes add their own rules.
    complete = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    for name, token in tokens.items():
        known = config.get(name)
        if token != (known.get("content") if isinstance(known, dict) else known):
            complete[name] = token
    if add_bos is not None:
        complete |= {"add_bos_token": add_bos, "add_eos_token": False}
        if TOKENIZER_JSON in content:
            complete["tokenizer_class"] = "PreTrainedTokenizerFast"
    content[TOKENIZER_CONFIG] = _dump(complete)
    return content


def _dump(value: Json) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
