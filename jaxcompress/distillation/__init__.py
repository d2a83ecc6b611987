"""Distillation: losses between a student's and a teacher's logits, and their gradient."""

from jaxcompress.distillation._gradients import DistillState as DistillState
from jaxcompress.distillation._gradients import distill as distill
from jaxcompress.distillation._logits import kd_loss as kd_loss
from jaxcompress.distillation._logits import kl_divergence as kl_divergence
from jaxcompress.distillation._logits import mse_logits as mse_logits
from jaxcompress.distillation._logits import soft_cross_entropy as soft_cross_entropy
