"""What a script may say, in the order in which it says it. Nothing is written here: each line names the file
of lab/ to read. Scripts import core, and lab only for a subject of their own (mixture, task2vec, int4 ...).
"""

# 1  constants become flags (cfg.typed: what the command line said); what ends a run on purpose
from lab.errors import Stop, UserError
from lab.run.limits import Amount, Count, Rate, Seed, Share, Whole, within
from lab.run.flags import Bookkeeping, Constants, Studied, parse_config, parsed_config
from lab.run.flags import constants_of, counting, names_of, override_lines
from lab.train.precision import BaseDtype, Dtype, with_dtype

# 2  processes: with one of them every verb does the obvious thing
from lab.run.signals import listening
from lab.train.processes import World, distributed  # who am I, among how many
from lab.train.processes import main_first, on_main  # rank 0 works, the others wait for its result
from lab.train.processes import all_reduce_sum, barrier, wrap_ddp  # all do the same

# 3  batches: row numbers are a pure function of (seed, epoch, step)
from lab.train.batches import ShardedBatches, each_once, length_groups, micro_batches, reseed, worst_case
from lab.train.device import to_device  # copies that nobody waits for

# 4  data: rows become token ids once, mapped into memory; six sets are built in (lab/data/builtin.py)
from lab.run.disks import cache_root
from lab.data.blocks import Blocks, Windows, stretches
from lab.data.cache import cached_folder
from lab.data.instructions import Examples, Packs, examples_of, load_instructions
from lab.data.pairs import collate, load_pairs
from lab.data.problems import Problems, load_problems
from lab.data.split import PARTS, final_parts, split_by_group  # final_parts: val, and test with final_eval
from lab.data.tables import read_rows, require_columns
from lab.data.text import Corpus, Tokens, open_corpus
from lab.data.tokenizers import (
    make_tokenizer,
    own_tokenizer,
    token_bytes,
    tokenizer_fingerprint,
    tokenizer_of,
)

# 5  models: a GPT by hand, encoders for pairs, LoRA by hand, weights from and to other people's folders
from lab.models.backbones import load_backbone, saved_part  # an encoder or a decoder; what of it is saved
from lab.models.encoders import PairScorer, load_encoder
from lab.models.generate import continuations, generate
from lab.models.gpt import GPT, GPTConfig
from lab.models.gpt_formats import save_pretrained, with_weights
from lab.models.lora import Adapters, adapted, add_lora, base_weights, merge_lora, narrow_base, rate_factors
from lab.models.lora_layers import LoRALinear
from lab.models.pretrained import build_model, open_model  # any language model, by its name
from lab.models.vectors import cache_vectors  # of a frozen encoder

# 6  a step: precision, loss, gradients of the global batch, rate, update
from lab.train.loss import IGNORE_INDEX, scaled_backward, sum_cross_entropy, token_log_probs
from lab.train.optim import Lion, Optimizer, Schedule, beta1_at, count_parameters, lr_at, make_optimizer
from lab.train.optim import gradient_norm, optimizer_step  # is it a spike? update
from lab.train.precision import Precision
from lab.train.prefetch import MicroBatches  # a rank's rows on its device, the next step's ahead of time
from lab.train.loop import FOREVER, count_steps, rehearse, steps  # what comes next, for all ranks

# 7  figures with intervals, and how they are shown
from lab.measure.answers import ask
from lab.measure.language import evaluate, loss_rows, measure
from lab.measure.lr_finder import find_lr
from lab.measure.statistics import (
    bootstrap,
    class_shares,
    classification_metrics,
    language_metrics,
    plus_minus,
)
from lab.run.meter import clock
from lab.run.terminal import one_line

# 8  several runs: arms x seeds, and which is better
from lab.compare.study import study

# 9  a run's folder: log, metrics, checkpoints; which run a command goes on with; where it came from
from lab.run.folder import Run, open_run  # open_run: none where it is finished
from lab.run.checkpoints import load_weights, tested_checkpoints, tested_or_newest_checkpoint
from lab.run.checkpoints import state_sha256, weights_sha256
from lab.run.resume import CALL_CONSTANTS, MAY_CHANGE, finished_run
from lab.run.stored import SCRIPTS, is_run, newest_run, out_folder, prepare_folder, read_config
from lab.run.stored import script_of, stored_config
from lab.run.provenance import device_name, git_state, refuse_dirty, refuse_other_data

# 10  files that are whole or not there
from lab.run.files import (
    joint_hash,
    sha256_file,
    short_hash,
    whole_file,
    whole_folder,
    write_json,
    write_lines,
)
