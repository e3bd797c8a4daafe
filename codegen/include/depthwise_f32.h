// Depthwise convolution, fp32, channels last: each channel has a filter of its own.
//
//   out[p][c] = bias[c] + sum over taps of x[p + tap][c] * w[tap][c]
//
// A vector holds neighbouring channels, and a register tile neighbouring pixels of one output row.
#ifndef DEPTHWISE_F32
#define DEPTHWISE_F32

namespace block_sparse {

// PIXELS output pixels of LANES channels. PITCH: floats between input pixels; DILATION: pixels between taps.
template <int LANES, int PIXELS, int KH, int KW, int64_t PITCH, int64_t STRIDE, int64_t DILATION>
struct DepthwiseTile {
  using Vec = Lanes<LANES>;
  using Value = typename Vec::Value;

  // acc[PIXELS][LANES], taps outside of the image left out.
  //
  // x: the image's first pixel, at the first of the channels. row, column: that tap 0 of the first pixel reads.
  // w, bias: at the first of the channels; CHANNELS floats between taps. CHECKED: taps may leave the image sideways.
  template <bool CHECKED, int64_t CHANNELS>
  BLOCK_SPARSE_INLINE void run(
      float* acc, const float* x, const Geometry& g, int64_t row, int64_t column, const float* w, const float* bias) {
    Value sum[PIXELS];
#pragma GCC unroll 16
    for (int p = 0; p < PIXELS; ++p) sum[p] = bias ? Vec::load(bias) : Value{};
#pragma GCC unroll 1
    for (int64_t kh = 0; kh < KH; ++kh, row += g.dilation_h, w += KW * CHANNELS) {
      if (row < 0 || row >= g.height) continue;
      const float* const line = x + row * g.row_stride;
      Value weights[KW];
#pragma GCC unroll 16
      for (int kw = 0; kw < KW; ++kw) weights[kw] = Vec::load(w + kw * CHANNELS);
#pragma GCC unroll 16
      for (int p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 16
        for (int kw = 0; kw < KW; ++kw) {
          const int64_t pixel = column + p * STRIDE + kw * DILATION;
          if (CHECKED && (pixel < 0 || pixel >= g.width)) continue;
          sum[p] = Vec::multiply_add(Vec::load(line + pixel * PITCH), weights[kw], sum[p]);
        }
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < PIXELS; ++p) Vec::store(sum[p], acc + p * LANES);
  }
};

}  // namespace block_sparse
#endif
