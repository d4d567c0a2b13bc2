"""Where documents begin in a micro-batch, and the row that its samples become."""

import pickle

import torch

from umv2_megatron.data.documents import STARTS, collate_documents, document_starts, packed

EOD = 9
TOKENS = torch.tensor([[1, EOD, 2, 3, EOD], [EOD, EOD, 4, 5, 6]])


def test_an_end_belongs_to_the_document_before_it():
    starts = document_starts(TOKENS, EOD)
    assert starts.tolist() == [0, 2, 5, 6, 7, 10] and starts.dtype == torch.int32


def test_without_an_end_every_sample_is_a_document():
    assert document_starts(torch.zeros(3, 4, dtype=torch.long), EOD).tolist() == [0, 4, 8, 12]


def test_starts_come_with_the_batch_of_a_loader():
    collate = pickle.loads(pickle.dumps(collate_documents(EOD)))  # as a spawned loader gets it
    batch = collate([{"tokens": row, "dataset_id": 3} for row in TOKENS])
    assert (batch["tokens"] == TOKENS).all() and batch["dataset_id"].tolist() == [3, 3]
    assert batch[STARTS].tolist() == [0, 2, 5, 6, 7, 10]


def test_packed():
    batch = packed({"tokens": TOKENS, "attention_mask": None}, document_starts(TOKENS, EOD))
    documents = batch["packed_seq_params"]
    assert batch["tokens"].tolist() == [TOKENS.flatten().tolist()] and batch["attention_mask"] is None
    assert documents.qkv_format == "thd" and documents.lengths == (2, 3, 1, 1, 3)
    assert documents.max_seqlen_q == documents.max_seqlen_kv == 3
    assert documents.cu_seqlens_q.tolist() == documents.cu_seqlens_kv.tolist() == [0, 2, 5, 6, 7, 10]
