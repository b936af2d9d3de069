"""Documents -> tokens -> a prepared folder; and the cache that makes it happen only once.

    survey   a pass over the text where its alphabet or its hash is needed first
    encode   the tokens, in shards of fixed size, in a working folder that a kill does not damage
    cut      split by tail: the last part of the run becomes the shards of the validation split
    finish   dataset.json closes the folder, which then takes its name

The result depends on the text and the options alone: not on the number of workers, nor on how often
the work was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from almostgpt.config import DataConfig
from almostgpt.data import dataset as prepared
from almostgpt.data.corpora import Source, open_source
from almostgpt.data.dataset import Dataset, digest_of, is_prepared, open_dataset
from almostgpt.data.encoding import SourceChanged, encode_source
from almostgpt.data.journal import JOURNAL, Journal, occupied
from almostgpt.data.loader import document_start
from almostgpt.data.manifest import dropped_from, options, source_entry, write_manifest
from almostgpt.data.mixture import Mixture
from almostgpt.data.progress import say
from almostgpt.data.shards import MAX_TOKENS
from almostgpt.data.survey import Survey, dropped_in_words, survey_documents, task_of
from almostgpt.data.token_runs import RunWriter
from almostgpt.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from almostgpt.data.tokenizer import (
    TOKENIZERS,
    CharTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
)
from almostgpt.data.workers import workers_for
from almostgpt.errors import UserError
from almostgpt.files import expand, fsync_folder


def cache_folder() -> Path:
    """``$ALMOSTGPT_CACHE``, by default ``~/.cache/almostgpt``. Not created here."""
    return expand(os.environ.get("ALMOSTGPT_CACHE") or "~/.cache/almostgpt")


def prepare(
    data: DataConfig,
    out: str | Path,
    *,
    cache: Path | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> Dataset:
    """Prepares the text of ``data`` into the new folder ``out`` and opens it.

    The work goes on where an earlier call for the same folder, of the same settings, stopped.

    Args:
        cache: keeps downloads; default :func:`~almostgpt.data.prepare.cache_folder`.
        progress: whether stderr hears of it.
        workers: processes; by default as many as the machine has cores, fewer for small text.

    Raises:
        UserError: text that cannot be read or encoded, by file and row; a folder in use; a full disk.
            What was finished before it is kept in ``.NAME.unfinished`` beside ``out``.
    """
    if data.mixture is not None:
        raise UserError(
            "data.mixture is for training: prepare each set by itself, then mix them with "
            "almostgpt train --data.mixture"
        )
    out, cache = expand(out), cache or cache_folder()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; choose another folder or delete it first")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}, but must be at least 1")
    survey = None
    if data.tokenizer == CharTokenizer.name:
        survey = survey_documents(data, cache, workers, progress)
    tokenizer = build_tokenizer(data.tokenizer, [] if survey is None else [survey.alphabet])
    return _Preparation(data, tokenizer, survey, out, cache, workers, progress).run(shared=False)


def cached_dataset(
    data: DataConfig,
    cache: Path | None = None,
    progress: bool = True,
    *,
    tokenizer: Tokenizer | None = None,
    workers: int | None = None,
) -> Dataset | Mixture:
    """The data of a configuration, ready to train on; prepared in the cache the first time.

    A prepared folder in ``data.path`` is opened as it is, with its own tokenizer, and so is each of a
    ``data.mixture``. Otherwise the cache is keyed by the content of the text, the tokenizer and the
    split options.

    Args:
        tokenizer: of a model that is there already, which takes the place of ``data.tokenizer``.
        workers: processes, as in :func:`prepare`.

    Raises:
        UserError: no data, or it is prepared with another tokenizer than the model's.
    """
    if data.mixture is not None:
        parts = [replace(data, path=path, mixture=None) for path in data.mixture]
        sets = [
            cached_dataset(part, cache, progress, tokenizer=tokenizer, workers=workers)
            for part in parts
        ]
        return Mixture.of(sets, list(data.mixture.values()))
    if data.path is not None and is_prepared(expand(data.path)):
        _refuse_reading_options(data)
        dataset = open_dataset(data.path, tokenizer or data.tokenizer, progress=progress)
        if tokenizer is not None:
            _check_prepared_for(tokenizer, dataset)
        elif _names_another(data.tokenizer, dataset.tokenizer):
            own = dataset.tokenizer.name
            say(f"{data.path}: made with the {own} tokenizer, not {data.tokenizer}", progress)
        return dataset
    cache = cache or cache_folder()
    survey = survey_documents(data, cache, workers, progress)
    if tokenizer is None:
        tokenizer = build_tokenizer(data.tokenizer, [survey.alphabet])
    # Refused now, rather than when all is prepared.
    document_start(data.documents, tokenizer, data.sampling)
    folder = cache / "datasets" / options(data, survey, tokenizer)["fingerprint"][:32]
    if (folder / prepared.FILE_NAME).is_file():
        return open_dataset(folder, progress=progress)
    return _Preparation(data, tokenizer, survey, folder, cache, workers, progress).run(shared=True)


def _refuse_reading_options(data: DataConfig) -> None:
    """They are of a text, and a prepared folder has none."""
    plain = DataConfig()
    names = ("column", "min_length", "deduplicate", "normalize")
    given = [name for name in names if getattr(data, name) != getattr(plain, name)]
    if given:
        raise UserError(
            f"{data.path}: already prepared, so data.{', data.'.join(given)} would do nothing; leave "
            "them out, or give the text itself as data.path"
        )


def _names_another(name_or_folder: str, own: Tokenizer) -> bool:
    """Whether the user asks for another tokenizer than a prepared folder has (char: default)."""
    if name_or_folder in TOKENIZERS:
        return name_or_folder not in (CharTokenizer.name, own.name)
    return not load_tokenizer(name_or_folder).same_as(own)


def _check_prepared_for(models: Tokenizer, dataset: Dataset) -> None:
    theirs = dataset.tokenizer
    if theirs.same_as(models):
        return
    other = f"another {theirs.name}" if theirs.name == models.name else f"the {theirs.name}"
    raise UserError(
        f"{dataset.folder}: prepared with {other} tokenizer, but the model that training begins with "
        f"has the {models.name} one ({models.vocab_size} ids): its ids mean other text. Give the "
        "text itself as data.path"
    )


class _Preparation:
    """One text on its way into one folder."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        survey: Survey | None,
        out: Path,
        cache: Path,
        workers: int | None,
        progress: bool,
    ):
        """``survey``: of a pass that was made already, None if the text was not read yet."""
        if data.shard_tokens > MAX_TOKENS:
            raise UserError(
                f"data.shard_tokens is {data.shard_tokens}, but at most {MAX_TOKENS} fit"
            )
        self.data, self.tokenizer, self.survey, self.out = data, tokenizer, survey, out
        self.source: Source = open_source(data, cache)
        self.task = task_of(data, self.source, alphabet=False)
        self.workers = workers or workers_for(self.source.size)
        self.progress = progress

    def run(self, *, shared: bool) -> Dataset:
        """``shared``: other processes may want the same folder, and whose work it is is no matter."""
        try:
            with occupied(self.out, wait=shared, progress=self.progress) as folder:
                if folder is not None:
                    self._announce()
                    try:
                        self._make(folder, shared)
                    except BaseException:
                        self._leave(folder)
                        raise
        except OSError as error:
            raise UserError(
                f"{self.out}: the data could not be prepared: {error.strerror or error} "
                f"({error.filename or self.out}). Make room, or choose another folder "
                "(ALMOSTGPT_CACHE sets the cache)"
            ) from error
        dataset = open_dataset(self.out, progress=self.progress)
        if self.survey is not None:
            wanted = options(self.data, self.survey, self.tokenizer)["fingerprint"]
            if dataset.fingerprint != wanted:
                raise UserError(
                    f"{self.out}: another process prepared other data here; choose another folder"
                )
        dropped = dropped_in_words(dropped_from(self.out))
        say(
            f"prepared {self.out}: {dataset.train_tokens:,} tokens to train on, "
            f"{dataset.val_tokens:,} to validate, vocabulary {dataset.vocab_size:,}"
            f"{f'; {dropped}' if dropped else ''}",
            self.progress,
        )
        return dataset

    def _announce(self) -> None:
        size = f", {self.source.size / 1e6:,.1f} MB" if self.source.size is not None else ""
        text = (
            self.survey
            and f"{self.survey.documents:,} documents, {self.survey.characters:,} characters"
        )
        say(
            f"preparing {self.data.path or self.data.corpus}{size}: {f'{text}, ' if text else ''}"
            f"{self.tokenizer.name} tokenizer, {self.workers} processes",
            self.progress,
        )

    def _make(self, folder: Path, shared: bool) -> None:
        """Everything, in ``folder``, which then takes its name."""
        if not (folder / prepared.FILE_NAME).is_file():
            journal = self._journal(folder, shared)
            while True:
                try:
                    runs = encode_source(
                        self.source,
                        self.task,
                        self.data,
                        self.tokenizer,
                        folder,
                        journal,
                        self.workers,
                        self.progress,
                    )
                except SourceChanged:
                    if not shared:
                        raise
                    journal = self._anew(folder, journal.val_limit)
                    continue
                limit = self._checked_limit(folder, journal.survey)
                if limit == journal.val_limit:
                    break
                # So few documents that one side would be empty; what moves them was not known before.
                journal = self._anew(folder, limit)
            if self.data.split == "tail":
                runs = _cut_tail(runs["all"], self.data.val_fraction)
            entries = [
                {"file": run.file(number).name, "split": split, **shard}
                for split, run in runs.items()
                for number, shard in enumerate(run.shards)
            ]
            survey = journal.survey
            write_manifest(
                source_entry(self.data, self.source, survey),
                options(self.data, survey, self.tokenizer),
                survey.dropped,
                entries,
                self.tokenizer,
                folder,
            )
        self._publish(folder)

    def _settings(self) -> dict[str, Any]:
        """All that shapes the tokens but the text itself, whose hash the journal keeps."""
        data, vocabulary = self.data, {"kind": self.tokenizer.name, **self.tokenizer.settings()}
        return {
            "data.corpus": self.source.kind,
            "data.column": data.column,
            "data.min_length": data.min_length,
            "data.deduplicate": data.deduplicate,
            "data.normalize": data.normalize,
            "data.split": data.split,
            "data.val_fraction": data.val_fraction,
            "data.shard_tokens": data.shard_tokens,
            "data.tokenizer": digest_of(vocabulary),
        }

    def _journal(self, folder: Path, shared: bool) -> Journal:
        """Of the work that is there already, or a new one."""
        limit = None
        if self.data.split == "document":
            limit = self.data.val_fraction
            if self.survey is not None:
                limit = self.survey.val_limit(limit)
        journal = Journal.read(folder)
        if journal is None:
            return self._anew(folder, limit)
        wanted = self._settings()
        other = [key for key in wanted if journal.settings.get(key) != wanted[key]]
        if other and not shared:
            raise UserError(
                f"{self.out}: was begun with other settings ({', '.join(other)}); go on with those, "
                f"choose another folder, or delete what there is: {folder}"
            )
        if other:
            return self._anew(folder, limit)
        done = sum(shard["tokens"] for run in journal.runs.values() for shard in run["shards"])
        say(f"going on after {done:,} tokens in finished shards", self.progress)
        return journal

    def _anew(self, folder: Path, val_limit: float | None) -> Journal:
        """An empty working folder, but for the tokenizer that the other processes load."""
        for file in folder.iterdir():
            file.unlink()
        self.tokenizer.save(folder)
        return Journal(self._settings(), val_limit=val_limit)

    def _checked_limit(self, folder: Path, survey: Survey) -> float | None:
        """Which places validate, now that all are known; ``UserError`` if the text is no good."""
        try:
            survey.check_not_empty(self.source.label)
            if self.survey is not None and self.survey.sha256 != survey.sha256:
                raise UserError(
                    f"{self.source.label}: the text changed while it was read; try again"
                )
            if self.data.split == "document":
                return survey.val_limit(self.data.val_fraction)
            return None
        except UserError:
            (folder / JOURNAL).unlink()  # nothing of it is worth going on with
            raise

    def _publish(self, folder: Path) -> None:
        """Clears away what is not of the dataset (of killed predecessors, too), and gives the name."""
        manifest = json.loads((folder / prepared.FILE_NAME).read_bytes())
        own = {prepared.FILE_NAME, TOKENIZER_FILE, *(entry["file"] for entry in manifest["shards"])}
        for file in sorted(folder.iterdir()):
            if file.name not in own:
                file.unlink()
        os.rename(folder, self.out)
        fsync_folder(self.out.parent)

    def _leave(self, folder: Path) -> None:
        """After a failure: what is finished stays, a mere beginning does not."""
        journal = Journal.read(folder)
        if journal is None or not journal.batches:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            say(f"what is finished is kept in {folder}; the same command goes on", self.progress)


def _cut_tail(run: RunWriter, val_fraction: float) -> dict[str, RunWriter]:
    """Makes the shards of both splits from those of the whole run.

    The shards before the cut only change their names. May be done again after a kill at any moment:
    the others stay until the folder is closed.
    """
    # As nanoGPT cuts it: the first int(n * 0.9) of n tokens train.
    tail = int(run.tokens * (1 - val_fraction))
    train, val = (
        RunWriter(run.folder, split, run.shard_tokens, run.dtype) for split in prepared.SPLITS
    )
    whole = tail // run.shard_tokens
    for number in range(whole):
        if run.file(number).exists():
            os.replace(run.file(number), train.file(number))
    train.shards = run.shards[:whole]
    for split, start, end in ((train, train.tokens, tail), (val, tail, run.tokens)):
        for tokens in run.read(start, end):
            split.append(tokens)
        split.finish()
    return {"train": train, "val": val}
