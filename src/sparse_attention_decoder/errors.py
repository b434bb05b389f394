"""Every error this package raises. Each is also the built-in error a caller would expect.

SparseAttentionError
├── ConfigError            (ValueError)           a setting that cannot work
├── ShapeError             (ValueError)           tensors that do not fit together
├── InputError             (ValueError)           a prompt or ids the model cannot read
│   └── ContextLengthError                        more tokens than the model was made for
├── SessionFileError       (ValueError)           a file that holds no session this model can take up
├── TargetError            (ValueError)           a quality that no setting reaches on this text
├── NonFiniteError         (ArithmeticError)      NaN or infinity in weights or keys
├── UnsupportedError       (NotImplementedError)  a model or feature that would come out wrong
├── BackendError           (RuntimeError)         kernels asked for by name that cannot serve
├── WorkerError            (RuntimeError)         a measuring process that failed or died
├── ModelLoadError         (OSError)              no model there, or a damaged one
└── CacheDirectoryError    (OSError)              no place to keep the converted model
"""


class SparseAttentionError(Exception):
    """The root: catch it to catch everything this package raises on purpose."""


class ConfigError(SparseAttentionError, ValueError):
    """A setting that cannot work; the message names it and a value that would."""


class ShapeError(SparseAttentionError, ValueError):
    """Tensors whose sizes do not fit together."""


class InputError(SparseAttentionError, ValueError):
    """A prompt or token ids that the model cannot read."""


class ContextLengthError(InputError):
    """More tokens than the model was made for."""


class SessionFileError(SparseAttentionError, ValueError):
    """No session can be read from that file, or written to it; the message says why."""


class TargetError(SparseAttentionError, ValueError):
    """Tuning was asked for a quality that no setting reaches; the message says what was reached."""


class NonFiniteError(SparseAttentionError, ArithmeticError):
    """NaN or infinity where numbers were needed: in weights or in cached keys."""


class UnsupportedError(SparseAttentionError, NotImplementedError):
    """A model or feature whose output would be wrong under sparse attention."""


class BackendError(SparseAttentionError, RuntimeError):
    """A kernel backend was asked for by name and cannot serve; the message says why."""


class WorkerError(SparseAttentionError, RuntimeError):
    """A process of a measurement failed or died; the message has what it said last."""


class ModelLoadError(SparseAttentionError, OSError):
    """There is no model at that place, or it is damaged."""


class CacheDirectoryError(SparseAttentionError, OSError):
    """The converted model cannot be kept: the cache directory cannot be written."""
