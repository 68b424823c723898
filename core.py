"""What a run_*.py says, in the order in which it says it. Nothing is written here: each line names the file
of lab/ to read. Scripts import core, and lab only for a subject of their own (mixture, task2vec, int4 ...).
"""

# 1  constants become flags; what all ranks agreed to stop for, and a user's mistake (one line, exit code 2)
from lab.errors import LostRanks, Stop, UserError
from lab.run.flags import parse_config, parsed_config, typed, with_flags

# 2  processes: with one of them every verb does the obvious thing
from lab.train.processes import (
    World,
    all_reduce_sum,
    barrier,
    distributed,
    main_first,
    on_main,
    progress,
    wrap_ddp,
)

# 3  batches: row numbers are a pure function of (seed, epoch, step)
from lab.train.batches import ShardedBatches, each_once, length_groups, micro_batches, reseed, worst_case

# 4  data: rows become token ids once, mapped into memory; five sets are built in (lab/data/builtin.py)
from lab.data.blocks import Blocks, Windows
from lab.data.cache import cache_root, split_by_group
from lab.data.instructions import Examples, Packs, load_instructions
from lab.data.pairs import collate, load_pairs
from lab.data.problems import Problems, load_problems
from lab.data.tables import read_rows, require_columns
from lab.data.text import PARTS, Corpus, Tokens, open_corpus
from lab.data.tokenizers import make_tokenizer, pretrained_tokenizer, token_bytes, tokenizer_fingerprint

# 5  models: a GPT by hand, encoders for pairs, LoRA by hand, weights from and to other people's folders
from lab.models.encoders import PairScorer, load_encoder
from lab.models.generate import continuations, generate
from lab.models.gpt import GPT, GPTConfig
from lab.models.gpt_formats import save_pretrained, with_weights
from lab.models.lora import Adapters, LoRALinear, adapted, add_lora, base_weights, merge_lora
from lab.models.pretrained import build_model, is_run, open_model, tokenizer_of
from lab.models.vectors import cache_vectors

# 6  a step: precision, loss, gradients of the global batch, rate, update
from lab.train.loss import IGNORE_INDEX, scaled_backward, sum_cross_entropy, token_log_probs
from lab.train.optim import beta1_at, count_parameters, lr_at, make_optimizer, optimizer_step
from lab.train.precision import Dtype, Precision, with_dtype

# 7  figures with intervals
from lab.measure.answers import ask
from lab.measure.language import evaluate, loss_rows, measure
from lab.measure.statistics import (
    bootstrap,
    class_shares,
    classification_metrics,
    language_metrics,
    plus_minus,
)

# 8  a run's folder: log, metrics, checkpoints, resume, what it came from
from lab.run.checkpoints import (
    chosen_checkpoint,
    load_weights,
    state_sha256,
    tested_checkpoints,
    weights_sha256,
)
from lab.run.files import (
    PROJECT,
    joint_hash,
    sha256_file,
    short_hash,
    whole_file,
    whole_folder,
    write_json,
    write_lines,
)
from lab.run.folder import Run
from lab.run.meter import clock
from lab.run.provenance import device_name, git_state, refuse_dirty, same_data
from lab.run.resume import CALL_CONSTANTS, MAY_CHANGE, finished_run, override_lines
from lab.run.signals import listening
from lab.run.stored import SCRIPTS, newest_run, out_folder, prepare_folder, prepared, read_config
from lab.run.terminal import one_line
