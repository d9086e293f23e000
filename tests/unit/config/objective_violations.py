"""Words, of which the first names the script, and the one message that they give."""

from __future__ import annotations

T5, BERT, GPT = "pretrain_t5", "pretrain_bert", "pretrain_gpt"
SEQUENCE_PARALLEL = "parallel.sequence_parallel=true"

OBJECTIVE_VIOLATIONS: dict[str, tuple[list[str], str]] = {
    # --------------------------------------------------------------------------------------------- script
    "script that is none": (
        ["script=foo"],
        "script=foo is not one of pretrain_gpt, pretrain_bert, pretrain_t5; leave it out: the command names the script",
    ),
    "architecture of another script": (
        [GPT, "model=bert_base"],
        "model.architecture=encoder is not what pretrain_gpt trains (decoder); run pretrain_bert, or choose a model of "
        "that architecture, such as model=gpt_tiny",
    ),
    "GPT under the script of BERT": (
        [BERT, "model=gpt_tiny"],
        "model.architecture=decoder is not what pretrain_bert trains (encoder); run pretrain_gpt, or choose a model of "
        "that architecture, such as model=bert_tiny",
    ),
    "objective of BERT under GPT": (
        [GPT, "objective=masked_lm"],
        "objective.name=masked_lm does not fit pretrain_gpt; run pretrain_bert, or use causal_lm, prefix_lm or "
        "fill_in_the_middle",
    ),
    "objective of GPT under BERT": (
        [BERT, "objective=prefix_lm"],
        "objective.name=prefix_lm does not fit pretrain_bert; run pretrain_gpt, or use masked_lm_nsp or masked_lm",
    ),
    "objective of GPT under T5": (
        [T5, "objective.name=causal_lm"],
        "objective.name=causal_lm does not fit pretrain_t5; run pretrain_gpt, or use span_corruption, bart_denoising "
        "or ul2",
    ),
    # ---------------------------------------------------------------------------------------------- model
    "pipeline and layers of both stacks": (
        [T5, "parallel.pipeline_parallel_size=9"],
        "parallel.pipeline_parallel_size=9 is more than model.num_layers + model.num_decoder_layers=4, so a stage "
        "would be empty; use 4 or fewer",
    ),
    "decoder layers of GPT": (
        [GPT, "model.num_decoder_layers=2"],
        "model.num_decoder_layers=2 needs model.architecture=encoder_decoder, not decoder, whose only stack has "
        "model.num_layers; set model.num_decoder_layers=null",
    ),
    "no decoder layers": (
        [T5, "model.num_decoder_layers=0"],
        "model.num_decoder_layers=0 must be at least 1; use 1 or more",
    ),
    "relative positions of GPT": (
        [GPT, "model.position_embedding=relative"],
        "model.position_embedding=relative needs model.architecture=encoder_decoder, not decoder; use learned or "
        "rotary",
    ),
    "relative positions of BERT": (
        [BERT, "model.position_embedding=relative"],
        "model.position_embedding=relative needs model.architecture=encoder_decoder, not encoder; use learned",
    ),
    "rotary positions of T5": (
        [T5, "model.position_embedding=rotary"],
        "model.position_embedding=rotary needs model.architecture=decoder, not encoder_decoder; use learned or "
        "relative",
    ),
    "relative buckets": (
        [T5, "model.relative_buckets=30"],
        "model.relative_buckets=30 must be a multiple of 4: two directions, near and far; use 28 or 32",
    ),
    "relative distance": (
        [T5, "model.relative_max_distance=16"],
        "model.relative_max_distance=16 must be more than half of model.relative_buckets=32, which are single "
        "distances; use 17 or more",
    ),
    "grouped heads of BERT": (
        [BERT, "model.num_query_groups=2"],
        "model.num_query_groups=2 needs model.architecture=decoder, not encoder, whose heads have keys and values of "
        "their own; set model.num_query_groups=null",
    ),
    "segments of T5": (
        [T5, "model.num_segments=2"],
        "model.num_segments=2 needs model.architecture=encoder, not encoder_decoder, whose samples have no parts; use "
        "0",
    ),
    "scaled head that is not tied": (
        [T5, "model.scale_tied_head=true"],
        "model.scale_tied_head=true needs model.tie_embeddings=true: a head of its own learns its scale; set "
        "model.scale_tied_head=false",
    ),
    "position offset": (
        [BERT, "model.position_offset=-1"],
        "model.position_offset=-1 must be a number >= 0; use 0 or more",
    ),
    # ---------------------------------------------------------------------------------------------- rates
    "masked fraction": (
        [BERT, "objective.masked_fraction=1"],
        "objective.masked_fraction=1 must be more than 0 and less than 1; use a fraction such as 0.15",
    ),
    "noise density": (
        [T5, "objective.noise_density=0"],
        "objective.noise_density=0 must be more than 0 and less than 1; use a fraction such as 0.15",
    ),
    "infill fraction": (
        [T5, "objective=bart_denoising", "objective.infill_fraction=1.5"],
        "objective.infill_fraction=1.5 must be more than 0 and less than 1; use a fraction such as 0.15",
    ),
    "next fraction": (
        [BERT, "objective.next_fraction=-0.5"],
        "objective.next_fraction=-0.5 must be at least 0 and at most 1; use a fraction such as 0.1",
    ),
    "rate of fill-in-the-middle": (
        [GPT, "objective=fill_in_the_middle", "objective.fim_fraction=1.1"],
        "objective.fim_fraction=1.1 must be at least 0 and at most 1; use a fraction such as 0.1",
    ),
    "mask and random tokens": (
        [BERT, "objective.random_token_fraction=0.3"],
        "objective.mask_token_fraction=0.8 and objective.random_token_fraction=0.3 must be at most 1 together, not "
        "1.1; use objective.random_token_fraction=0.2 or less",
    ),
    "mean span": (
        [T5, "objective.mean_span_length=0.5"],
        "objective.mean_span_length=0.5 must be a number >= 1; use 1 or more",
    ),
    "span length of BART": (
        [T5, "objective.infill_span_length=0"],
        "objective.infill_span_length=0 must be a positive number; use a value above 0",
    ),
    "number of denoisers": (
        [T5, "objective=ul2", "objective.ul2_weights=[1,2]"],
        "objective.ul2_weights=[1.0, 2.0] has 2 numbers; give 7, one a denoiser: two R, one S, four X",
    ),
    "spans of denoisers": (
        [T5, "objective=ul2", "objective.ul2_span_lengths=[3,8,3,8,64]"],
        "objective.ul2_span_lengths=[3.0, 8.0, 3.0, 8.0, 64.0] has 5 numbers; give 6: of two R- and four X-denoisers",
    ),
    "densities of denoisers": (
        [T5, "objective=ul2", "objective.ul2_noise_densities=[0.15,0.15,0.5,0.5,0.15,1.5]"],
        "objective.ul2_noise_densities=[0.15, 0.15, 0.5, 0.5, 0.15, 1.5] must lie inside (0, 1); the paper's are "
        "[0.15, 0.15, 0.5, 0.5, 0.15, 0.5]",
    ),
    "weights of denoisers": (
        [T5, "objective=ul2", "objective.ul2_weights=[0,0,0,0,0,0,0]"],
        "objective.ul2_weights=[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] must be 0 or more and not all 0; give each denoiser "
        "its share",
    ),
    # -------------------------------------------------------------------------------------------- lengths
    "next sentence without segments": (
        [BERT, "model=roberta_base"],
        "objective.name=masked_lm_nsp needs model.num_segments >= 2, not 1: the model must tell the two parts apart; "
        "use model.num_segments=2 or objective=masked_lm",
    ),
    "decoder length of span corruption": (
        [T5, "objective.decoder_seq_length=64"],
        "objective.decoder_seq_length=64 cannot be chosen with objective.name=span_corruption: its decoder has as many "
        "positions as the spans need; set objective.decoder_seq_length=null",
    ),
    "decoder length of BART": (
        [T5, "objective=bart_denoising", "objective.decoder_seq_length=64"],
        "objective.decoder_seq_length=64 cannot be chosen with objective.name=bart_denoising: its decoder writes out "
        "all data.seq_length positions; set objective.decoder_seq_length=null",
    ),
    "decoder length of GPT": (
        [GPT, "objective.decoder_seq_length=64"],
        "objective.decoder_seq_length=64 cannot be chosen with objective.name=causal_lm: there is no decoder beside "
        "the only stack; set objective.decoder_seq_length=null",
    ),
    "beginning of text of an encoder": (
        [BERT, "data.add_bos=true"],
        "data.add_bos=true has no meaning with objective.name=masked_lm_nsp, which itself puts tokens around what the "
        "model reads; leave data.add_bos out, or set it to null",
    ),
    "loss after the end of a document": (
        [BERT, "data.mask_loss_after_eod=true"],
        "data.mask_loss_after_eod=true has no meaning with objective.name=masked_lm_nsp, which does not predict the "
        "token behind each position; set data.mask_loss_after_eod=false",
    ),
    "no room for a pair": (
        [BERT, "data.seq_length=4"],
        "data.seq_length=4 has no room for text beside the special tokens of objective.name=masked_lm_nsp; use 5 or "
        "more",
    ),
    "no room for a span": (
        [T5, "data.seq_length=2"],
        "data.seq_length=2 has no room for text beside the special tokens of objective.name=span_corruption; use 10 or "
        "more",
    ),
    "no room for a denoiser": (
        [T5, "objective=ul2", "objective.decoder_seq_length=2"],
        "data.seq_length=128 with 2 positions of the decoder has no room for a denoiser of objective.name=ul2; use "
        "objective.decoder_seq_length=14 or more",
    ),
    "too short for the spans": (
        [T5, "data.seq_length=8"],
        "data.seq_length=8 is too short for a span of objective.mean_span_length=3 at objective.noise_density=0.15; "
        "use 10 or more",
    ),
    "spans that touch": (
        [T5, "objective.noise_density=0.9", "objective.mean_span_length=2"],
        "objective.noise_density=0.9 with objective.mean_span_length=2 leaves 64 of 636 tokens to keep 286 spans "
        "apart; use a lower density or longer spans",
    ),
    "spans that touch in a long sequence": (  # whose sentinels and decoder are not spoken of
        [T5, "objective.noise_density=0.9", "data.seq_length=1024"],
        "objective.noise_density=0.9 with objective.mean_span_length=3 leaves 512 of 5116 tokens to keep 1535 spans "
        "apart; use a lower density or longer spans",
    ),
    "hardly any text": (
        [T5, "objective.noise_density=0.999"],
        "objective.noise_density=0.999 with objective.mean_span_length=3 leaves 64 of 63500 tokens to keep 21145 spans "
        "apart; use a lower density or longer spans",
    ),
    "too short for infilling": (
        [T5, "objective=bart_denoising", "data.seq_length=8"],
        "data.seq_length=8 is too short for a span of objective.infill_span_length=3: objective.infill_fraction=0.3 "
        "covers 2 tokens of it; use 11 or more",
    ),
    "endless infilling": (
        [T5, "objective=bart_denoising", "objective.infill_span_length=100000"],
        "data.seq_length=128 is too short for a span of objective.infill_span_length=100000: "
        "objective.infill_fraction=0.3 covers 38 tokens of it; use shorter spans",
    ),
    "too short for a denoiser": (
        [T5, "objective=ul2", "data.seq_length=16"],
        "data.seq_length=16 is too short for objective.name=ul2: each weighted denoiser of mean span 3 or 8 must take "
        "out a whole span and no two may become the same task, but the one of (8, 0.15) does not; use "
        "data.seq_length=68 or more, or set numbers 2, 6, 7 of objective.ul2_weights to 0",
    ),
    "denoisers that become one": (
        [T5, "objective=ul2", "data.seq_length=64"],
        "data.seq_length=64 is too short for objective.name=ul2: each weighted denoiser of mean span 3 or 8 must take "
        "out a whole span and no two may become the same task, but (8, 0.15) and (64, 0.15) are the same; use "
        "data.seq_length=68 or more, or set number 6 of objective.ul2_weights to 0",
    ),
    "decoder too short for a denoiser": (
        [T5, "objective=ul2", "objective.decoder_seq_length=3"],
        "data.seq_length=128 with objective.decoder_seq_length=3 is too short for objective.name=ul2: each weighted "
        "denoiser of mean span 3 or 8 must take out a whole span and no two may become the same task, but the one of "
        "(3, 0.15) does not; use objective.decoder_seq_length=14 or more, or set numbers 1, 2, 4, 5 "
        "of objective.ul2_weights to 0",
    ),
    "both stacks too short for a denoiser": (
        [T5, "objective=ul2", "data.seq_length=24", "objective.decoder_seq_length=30"],
        "data.seq_length=24 with objective.decoder_seq_length=30 is too short for objective.name=ul2: each weighted "
        "denoiser of mean span 3 or 8 must take out a whole span and no two may become the same task, but the one of "
        "(8, 0.15) does not; use data.seq_length=68 or more and objective.decoder_seq_length=null, or set numbers 2, 6 "
        "of objective.ul2_weights to 0",
    ),
    "sentinels of spans": (
        [T5, "data.seq_length=2048", "model.max_position_embeddings=2048"],
        "data.seq_length=2048 makes up to 114 spans with objective.name=span_corruption, and data.tokenizer=train "
        "gives 100 sentinels; use data.seq_length=1809 or less, longer spans, or a tokenizer with more",
    ),
    "sentinels of denoisers": (
        [T5, "objective=ul2", "data.seq_length=1024"],
        "data.seq_length=1024 makes up to 128 spans with objective.name=ul2, and data.tokenizer=train gives 100 "
        "sentinels; use data.seq_length=807 or less, or a tokenizer with more",
    ),
    "decoder and positions": (
        [T5, "objective.noise_density=0.6", "model.max_position_embeddings=128"],
        "objective.name=span_corruption: the decoder's 170 positions are more than model.max_position_embeddings=128; "
        "lower data.seq_length, or set model.max_position_embeddings=170",
    ),
    "chosen decoder and positions": (
        [T5, "objective=ul2", "objective.decoder_seq_length=2000"],
        "objective.decoder_seq_length=2000: the decoder's positions are more than model.max_position_embeddings=1024; "
        "use at most 1024, or set model.max_position_embeddings=2000",
    ),
    "sequence parallel and decoder": (
        [T5, "parallel=tp2", SEQUENCE_PARALLEL],
        "objective.name=span_corruption: the decoder's 29 positions must be a multiple of "
        "parallel.tensor_parallel_size=2 with parallel.sequence_parallel=true; use data.seq_length=130",
    ),
    "sequence parallel and chosen decoder": (
        [T5, "objective=ul2", "objective.decoder_seq_length=62", "parallel=tp4", SEQUENCE_PARALLEL],
        "objective.decoder_seq_length=62: the decoder's positions must be a multiple of "
        "parallel.tensor_parallel_size=4 with parallel.sequence_parallel=true; use objective.decoder_seq_length=60 or "
        "64",
    ),
}  # fmt: skip
