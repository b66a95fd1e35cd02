"""The data recipe: which text, what is dropped from it, which vocabulary, what share to hold out."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mslt.validation import Frozen


class FileSource(Frozen):
    """Files of one kind under `path`, a folder or a file, relative to the working folder. `max_files`: read this many
    at most. `column`: the field that holds the text, of `json` and `parquet`."""

    kind: Literal["text", "lines", "json", "parquet", "wikipedia", "books", "python_docs"]
    path: str | None = None
    max_files: int | None = Field(default=None, ge=1)
    column: str = "text"

    @model_validator(mode="after")
    def needs_path(self) -> "FileSource":
        if self.path is None and self.kind != "python_docs":
            raise ValueError(f"a source of kind {self.kind} needs a path")
        return self

    @model_validator(mode="after")
    def column_only_of_rows(self) -> "FileSource":
        if "column" in self.model_fields_set and self.kind not in ("json", "parquet"):
            raise ValueError(f"column is for json and parquet; leave it out with {self.kind}")
        return self


class HubSource(Frozen):
    """A split of a dataset on the Hugging Face hub, or in a local folder that `datasets` reads; streamed.
    `revision`: the hub's commit, tag or branch; left out, the newest commit."""

    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    column: str = "text"
    max_documents: int | None = Field(default=None, ge=1)


Source = FileSource | HubSource


class Duplicates(Frozen):
    """Which repeated documents are dropped; the first of them stays. `near`: Jaccard similarity of their word 5-grams,
    estimated by MinHash, of at least `threshold`. `max_index_gb` caps what finding them may hold in memory."""

    exact: bool = True
    near: bool = True
    threshold: float = Field(default=0.8, gt=0.5, le=1)
    max_index_gb: float = Field(default=8.0, gt=0)


class Vocabulary(Frozen):
    """A vocabulary to train, or an existing one: `file`, a vocab.txt, or `pretrained`, a BERT tokenizer on the Hugging
    Face hub or in a local folder. `train_gb`: how much text to train on; evenly drawn documents where there is more."""

    file: str | None = None
    pretrained: str | None = None
    size: int = Field(default=30522, ge=256, le=2**20)
    lowercase: bool = True
    min_frequency: int = Field(default=2, ge=1)
    train_gb: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def one_origin(self) -> "Vocabulary":
        given = [name for name in ("file", "pretrained") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError("give file or pretrained, not both")
        idle = {"size", "min_frequency", "train_gb"} | ({"lowercase"} if self.pretrained else set())
        idle &= self.model_fields_set
        if given and idle:
            raise ValueError(f"with {given[0]} there is nothing to train: leave out {', '.join(sorted(idle))}")
        return self


class DataRecipe(Frozen):
    sources: tuple[Annotated[Source, Field(discriminator="kind")], ...]
    duplicates: Duplicates = Duplicates()
    vocabulary: Vocabulary = Vocabulary()
    validation_share: float = Field(default=0.02, ge=0, lt=1)
    min_document_tokens: int = Field(default=32, ge=1)

    @field_validator("sources")
    @classmethod
    def some_text(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        if not sources:
            raise ValueError("name at least one source of text")
        for index, source in enumerate(sources):
            if source in sources[:index]:
                raise ValueError(f"source {index} is source {sources.index(source)} again; leave one of them out")
        return sources
