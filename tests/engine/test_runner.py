"""The runner: what it hands to the kernels."""

import numpy as np
from pool_model import PoolModel
from test_engine import make_strategy

from hybridcache.engine.packing import RowInput
from hybridcache.engine.runner import ModelRunner
from hybridcache.engine.sampling import GREEDY
from hybridcache.kernels.backend import make_backend


def test_a_batch_holds_what_the_kernels_read():
    strategy = make_strategy("shared_pool", 1 << 20)
    for seq_id, tokens in ((4, 40), (7, 3), (9, 150)):
        assert strategy.admit(seq_id, tokens)
    found = []
    model = PoolModel(before_forward=found.append)
    runner = ModelRunner(model, strategy, make_backend("torch", "cpu"), max_rows=4, max_tokens=200)
    rows = [
        RowInput(7, 2, 1, np.array([11]), GREEDY),
        RowInput(4, 0, 40, np.arange(40), GREEDY),
        RowInput(9, 64, 64, np.arange(64), None),
    ]
    assert len(runner.launch(rows).wait()) == 2
    (batch,) = found
    tables = strategy.tables([7, 4, 9])
    assert (batch.num_decode, batch.num_rows, batch.num_tokens) == (1, 3, 105)
    assert batch.token_ids_T.tolist() == [11, *range(40), *range(64)]
    assert batch.position_T.tolist() == [2, *range(40), *range(64, 128)]
    assert batch.row_T.tolist() == [0] + [1] * 40 + [2] * 64
    assert batch.context_len_B.tolist() == [3, 40, 128]
    assert batch.prefill_cu_seqlens.tolist() == [0, 40, 104]
    assert batch.logit_index_R.tolist() == [0, 40]
    assert (batch.max_prefill_len, batch.max_context_len) == (64, 128)
    assert batch.kv_table_BN.tolist() == tables.kv.tolist()
    assert runner.inputs.table[3].tolist() == [-1] * runner.inputs.table.shape[1]
    assert batch.state_write_BL.tolist() == tables.state.tolist()
    names = ("row_T", "kv_table_BN", "state_read_BL", "state_write_BL", "context_len_B", "prefill_cu_seqlens")
    assert {str(getattr(batch, name).dtype) for name in names} == {"torch.int32"}
    names = ("token_ids_T", "position_T", "logit_index_R")
    assert {str(getattr(batch, name).dtype) for name in names} == {"torch.int64"}
