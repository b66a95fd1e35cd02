"""The data recipe: which text, which vocabulary, what share to hold out."""

from typing import Literal

from pydantic import Field, model_validator

from mslt.validation import Frozen


class Source(Frozen):
    """`path`: a folder or a file, relative to the working folder. `limit`: read this many files at most."""

    kind: Literal["text", "wikipedia", "books", "python_docs"]
    path: str | None = None
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def needs_path(self) -> "Source":
        if self.path is None and self.kind != "python_docs":
            raise ValueError(f"a source of kind {self.kind} needs a path")
        return self


class Vocabulary(Frozen):
    """A vocabulary to train, or, with `file`, the vocab.txt of an existing one."""

    file: str | None = None
    size: int = Field(default=30522, ge=256)
    lowercase: bool = True
    min_frequency: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def file_or_training(self) -> "Vocabulary":
        trained = {"size", "min_frequency"} & self.model_fields_set
        if self.file is not None and trained:
            raise ValueError(f"with a file there is nothing to train: leave out {', '.join(sorted(trained))}")
        return self


class DataRecipe(Frozen):
    sources: tuple[Source, ...] = Field(min_length=1)
    vocabulary: Vocabulary = Vocabulary()
    validation_share: float = Field(default=0.02, ge=0, lt=1)
    min_document_tokens: int = Field(default=32, ge=1)
