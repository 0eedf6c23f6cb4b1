// Adam with eight bits per state: 256 elements at a time share a scale.
//
// The state of a block, with `a` its scale for exp_avg and `b` for exp_avg_sq (fp32 each, their
// count is ceil(numel / 256)), and uint8 codes c of one element each:
//
//   exp_avg     m = a * s * |s| / 127^2           with s = c - 128, in -127 .. 127
//   exp_avg_sq  r = b * (c / 255)^2,  v = r^2     the root of v is what is stored
//
// so the steps between values shrink towards 0, where most values are: a relative step of
// 2 / |s| and 2 / c. All zero state is: codes of exp_avg 128, codes of exp_avg_sq 0, scales 0.
//
// A step computes m', v' = r'^2 and the parameter in fp32 as Adam does, with the unrounded m' and
// v'. Then, over the block, a' = max |m'| and b' = max r' (each raised to 2^-126 unless it is 0),
// and with x = 127 * sqrt(|m'| / a') and y = 255 * sqrt(r' / b')
//
//   c_m = 128 + sign(m') * floor(x + u)
//   c_v = floor(y + w), but at least 1 where v' > 0: a second moment is never rounded to 0
//
// u = w = 1/2 without a seed (nearest); with one, uniform in [0, 1), from rounding.h:
//   u = ((bits >> 16) & 255) / 256,  w = (bits >> 24) / 256,  and bits & 0xffff rounds the parameter.
// With a seed the moments are right in expectation. Without one, v cannot follow a change that is
// smaller than half a step, which with beta2 = 0.999 is most of them: give a seed when training.
//
// A NaN or infinity in a gradient makes the scales of its block NaN or infinite.
//
// Source: blocks as in Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"; the
// code of our own, in place of their table, is computed with vector instructions.
