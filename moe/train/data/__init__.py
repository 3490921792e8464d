"""The data pipeline: tokenise text, split it into training and held-out tokens, and pack it into batches.

Short text is kept in memory. Long text is tokenised once, into a store on disk, from which every rank reads what it
needs. A bigram model is fitted to the same tokens as a baseline. Nothing here communicates: every rank opens the same
corpus, and the sequences of a step depend only on the step and the seed.
"""

from .ahead import STEPS as READ_AHEAD
from .ahead import Ahead
from .bigram import bigram_loss
from .build import Wanted, store_at, wanted_store
from .corpus import Corpus, load_corpus, read_documents, read_labelled
from .cursor import Cursor
from .packing import Batches, heldout_batches
from .store import check as check_store
from .token_file import DataError
from .tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer, special_token

__all__ = [
    "READ_AHEAD",
    "Ahead",
    "Batches",
    "Corpus",
    "Cursor",
    "DataError",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "Wanted",
    "bigram_loss",
    "check_store",
    "heldout_batches",
    "load_corpus",
    "load_tokenizer",
    "read_documents",
    "read_labelled",
    "special_token",
    "store_at",
    "wanted_store",
]
