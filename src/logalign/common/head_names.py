"""Names under which models keep their unembedding, in modules and in checkpoints alike."""

HEADS_ANYWHERE = ("lm_head", "embed_out", "unembed", "unembedding", "output_projection", "output_layer")
"""Names that say so wherever they stand."""
HEADS_AT_TOP = ("head", "classifier", "fc", "fc_out", "score", "output", "out")
"""Names that say so only in the model itself, not inside a block."""
