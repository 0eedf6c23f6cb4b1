// Adam with eight bits per state: 256 elements at a time share a scale.
//
// The state of a block, with `a` its scale for exp_avg and `b` for exp_avg_sq (fp32, one for each
// 256 elements and one for the rest), and uint8 codes of one element each:
//
//   exp_avg     m = a * s * |s| / 127^2     with s = code - 128, in -127 .. 127
//   exp_avg_sq  v = b * (code / 255)^4      so its root is b^(1/2) * (code / 255)^2
//
// so the steps between values shrink towards 0, where most values are: neighbours differ by
// 2 / |s| of m, and by 2 / code of the root of v. State 0: codes 128 and 0, scales 0.
//
// A step decodes m and v, and computes m', v' and the parameter in fp32 as Adam does, with m' and
// v' not rounded. Then, over the block, a' = max |m'| and b' = max v', each raised to 2^-126 unless
// it is 0, and with X = |m'| / a' * 127^2 and Y = v' / b' * 255^4:
//
//   k = min(floor(X^(1/2)), 126)   |s| = k + 1 if k^2 + t (2 k + 1) < X, else k;  s has m's sign
//   k = min(floor(Y^(1/4)), 254)   code = k + 1 if k^4 + w ((k + 1)^4 - k^4) < Y, else k
//   code of v at least 1 where v' > 0: it is never rounded to 0, which would make a step infinite.
//
// t = w = 1/2 without a seed: the nearest value. With a seed both are uniform in [0, 1), from
// rounding.h: t = (((bits >> 16) & 255) + 1/2) / 256 and w = ((bits >> 24) + 1/2) / 256, so that the
// moments are right in expectation; bits & 0xffff round a bf16 parameter. Without a seed v cannot
// follow a change of less than half a step, which with beta2 = 0.999 is most: train with one.
//
// A block where a' or b' is NaN or infinite (a NaN or infinity in a gradient) keeps that as its
// scale; its codes mean nothing any more.
//
// Source: blocks as in Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"; the
// code of our own, in place of their table, is computed with vector instructions.
