"""Data: corpus preparation, token store, global order, skip ledger, stream."""
