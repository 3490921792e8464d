"""Text to batches: tokenise, split into train and held-out, pack, and measure a bigram model on the same tokens.

Nothing here communicates: every rank reads the same files and comes to the same corpus, and which
sequences form a step depends on the step alone.
"""

from .bigram import bigram_loss
from .corpus import Corpus, load_corpus
from .packing import Batches, heldout_batches
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batches", "Corpus", "Tokenizer", "bigram_loss", "heldout_batches", "load_corpus", "load_tokenizer"]
