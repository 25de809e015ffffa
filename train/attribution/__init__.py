"""Why a spike came: PaLM's ablation, done by itself from a run folder."""
