// Sparse 1x1 convolutions and depthwise ones in a row, fp32, on bands of image rows.
//
// Each band has memory of its own, in which a tensor is [channel][row][column], with room for the rows of other
// bands that its readers need. What one thread writes there, others read only at the borders.
#ifndef LAYER_CHAIN_F32
#define LAYER_CHAIN_F32

namespace block_sparse {

// A tensor in the memory of bands: image row first[band] begins at `offset`, and channels lie `pitch` floats apart.
template <int64_t BANDS>
struct BandTensor {
  int64_t channels, height, width;
  int64_t rows;   // that a band owns
  int64_t count;  // most rows in the memory of a band
  int64_t pitch, offset;
  int64_t first[BANDS];

  constexpr Range own(int64_t band) const {
    return {std::min(height, band * rows), std::min(height, (band + 1) * rows)};
  }
  // The rows in the memory of a band.
  constexpr Range held(int64_t band) const { return {first[band], std::min(height, first[band] + count)}; }
};

// The memory of an image's bands, FLOATS each.
template <int64_t BANDS, int64_t FLOATS>
struct BandMemory {
  float* memory;

  inline float* at(const BandTensor<BANDS>& t, int64_t band, int64_t row) const {
    return memory + band * FLOATS + t.offset + (row - t.first[band]) * t.width;
  }

  // Copies rows of `wanted` that other bands own.
  __attribute__((noinline)) void take(const BandTensor<BANDS>& t, int64_t band, Range wanted) const {
    const Range own = t.own(band);
    for (int64_t row = wanted.begin; row < wanted.end; ++row) {
      if (row >= own.begin && row < own.end) continue;
      const float* from = at(t, row / t.rows, row);
      float* to = at(t, band, row);
      for (int64_t c = 0; c < t.channels; ++c, from += t.pitch, to += t.pitch)
        std::memcpy(to, from, t.width * sizeof(float));
    }
  }

  // The same from an image in memory, channels first.
  __attribute__((noinline)) void load(const BandTensor<BANDS>& t, int64_t band, const float* image) const {
    const Range rows = t.held(band);
    const float* from = image + rows.begin * t.width;
    float* to = at(t, band, rows.begin);
    for (int64_t c = 0; c < t.channels; ++c, from += t.height * t.width, to += t.pitch)
      std::memcpy(to, from, (rows.end - rows.begin) * t.width * sizeof(float));
  }
};

// The sums of a 1x1 convolution, and pixels of the same channels that are added to them, or null.
template <int LANES, class Activation>
struct AddAndActivate {
  using Vec = Lanes<LANES>;
  const float* added;
  int64_t pitch;
  inline __attribute__((always_inline)) typename Vec::Value operator()(
      const typename Vec::Value& sum, int row, int vector) const {
    return Activation{}(added ? sum + Vec::load(added + row * pitch + vector * LANES) : sum);
  }
};

// TOTAL vectors of pixels, in tiles of VECTORS and a last one of LAST. Channels lie IN and OUT floats apart.
template <int LANES, int HEIGHT, int VECTORS, int LAST, int64_t TOTAL, int64_t IN, int64_t OUT, int FLUSH>
struct PixelRows {
  static constexpr int64_t PITCH = OUT, BH = HEIGHT;
  static constexpr int64_t END = TOTAL - LAST;
  template <int N>
  using Tile = SparseRows<LANES, HEIGHT, N, IN, LANES * N, FLUSH>;

  // All block rows, one tile of pixels after the other: its inputs stay in L1.
  template <class Activation>
  __attribute__((noinline)) static void run(
      float* out, const float* x, const RowWeights& w, const int32_t* row_ptr, int64_t rows, const float* bias,
      const float* added, int64_t added_pitch) {
    for (int64_t v = 0; v < END; v += VECTORS)
      tile<VECTORS, Activation>(out + v * LANES, x + v * LANES, w, row_ptr, rows, bias, added ? added + v * LANES : added, added_pitch);
    tile<LAST, Activation>(out + END * LANES, x + END * LANES, w, row_ptr, rows, bias, added ? added + END * LANES : added, added_pitch);
  }

  // One block row.
  template <class Activation>
  BLOCK_SPARSE_INLINE void row(
      float* out, const float* x, const RowWeights& w, int32_t begin, int32_t end, const float* bias) {
    const AddAndActivate<LANES, Activation> activate{nullptr, 0};
    for (int64_t v = 0; v < END; v += VECTORS)
      Tile<VECTORS>::template row<OUT>(out + v * LANES, x + v * LANES, w, begin, end, bias, activate);
    Tile<LAST>::template row<OUT>(out + END * LANES, x + END * LANES, w, begin, end, bias, activate);
  }

 private:
  template <int N, class Activation>
  BLOCK_SPARSE_INLINE void tile(
      float* out, const float* x, const RowWeights& w, const int32_t* row_ptr, int64_t rows, const float* bias,
      const float* added, int64_t added_pitch) {
    for (int64_t r = 0; r < rows; ++r) {
      const AddAndActivate<LANES, Activation> activate{added ? added + r * HEIGHT * added_pitch : added, added_pitch};
      Tile<N>::template row<OUT>(
          out + r * HEIGHT * OUT, x, w, row_ptr[r], row_ptr[r + 1], bias + r * HEIGHT, activate);
    }
  }
};

// A depthwise layer: output rows of one channel after the other, ROWS at a time. WIDE: floats of the CPU's vectors,
// of which short rows take half.
template <class G, int LANES, int WIDE, int ROWS, class Activation>
struct ChannelRows {
  using Tile = PlaneTile<G, LANES, ROWS>;
  using Vec = Lanes<LANES>;

  // plane: of the input, its row 0, whether that is in memory or not. out: row rows.begin.
  BLOCK_SPARSE_INLINE void run(float* out, const float* plane, Range rows, const float* w, const float* bias) {
    for (int64_t oh = rows.begin; oh < rows.end; oh += ROWS) {
      float* const y = out + (oh - rows.begin) * G::OW;
      for (int64_t tile = 0; tile + 1 < Tile::TILES; ++tile) part<LANES>(y, plane, oh, rows.end, tile, w, bias);
      part<G::OW - (Tile::TILES - 1) * LANES>(y, plane, oh, rows.end, Tile::TILES - 1, w, bias);
    }
    if (LANES == WIDE) return;
    const int64_t count = (rows.end - rows.begin) * G::OW;
    for (int64_t i = 0; i < count; i += WIDE) {
      const int64_t rest = std::min<int64_t>(WIDE, count - i);
      const auto value = Activation{}(rest == WIDE ? Lanes<WIDE>::load(out + i) : Lanes<WIDE>::load(out + i, rest));
      if (rest == WIDE) Lanes<WIDE>::store(value, out + i);
      else Lanes<WIDE>::store(value, out + i, rest);
    }
  }

  // All channels, `in` and `out_pitch` floats apart.
  __attribute__((noinline)) static void run_all(
      float* out, int64_t out_pitch, const float* plane, int64_t in, int64_t channels, Range rows, const float* w,
      const float* bias) {
    for (int64_t c = 0; c < channels; ++c)
      run(out + c * out_pitch, plane + c * in, rows, w + c * Tile::TAPS, bias + c);
  }

 private:
  template <int COLUMNS>
  BLOCK_SPARSE_INLINE void part(
      float* y, const float* plane, int64_t oh, int64_t end, int64_t tile, const float* w, const float* bias) {
    alignas(64) float acc[ROWS * LANES];
    Tile::run(acc, plane, oh, tile, w, bias);
#pragma GCC unroll 16
    for (int o = 0; o < ROWS; ++o) {
      if (oh + o >= end) break;
      const auto value = activated(Vec::load(acc + o * LANES));
      if (COLUMNS == LANES) Vec::store(value, y + o * G::OW + tile * LANES);
      else Vec::store(value, y + o * G::OW + tile * LANES, COLUMNS);
    }
  }
  template <class Value>
  BLOCK_SPARSE_INLINE Value activated(const Value& x) {
    if constexpr (LANES == WIDE) return Activation{}(x);
    else return x;
  }
};

// The operands of a 1x1 convolution and a depthwise one.
struct PairOperands {
  RowWeights weights;
  const int32_t* row_ptr;
  int64_t channels;  // between them
  const float *inner_bias, *filters, *bias;
};

// Both on `rows` of the output; in between, a block row at a time, in `inner`. top: the image row at which x begins.
template <class Inner, class Outer, class Activation, int64_t WIDTH, int64_t OUT>
__attribute__((noinline)) void run_pair(
    float* out, const float* x, float* inner, int64_t top, Range rows, const PairOperands& p) {
  for (int64_t r = 0; r * Inner::BH < p.channels; ++r) {
    const int64_t first = r * Inner::BH, height = std::min(Inner::BH, p.channels - first);
    Inner::template row<Activation>(inner, x, p.weights, p.row_ptr[r], p.row_ptr[r + 1], p.inner_bias + first);
    for (int64_t j = 0; j < height; ++j) {
      const float* const plane = inner + j * Inner::PITCH - top * WIDTH;
      Outer::run(out + (first + j) * OUT, plane, rows, p.filters + (first + j) * Outer::Tile::TAPS, p.bias + first + j);
    }
  }
}

}  // namespace block_sparse
#endif
