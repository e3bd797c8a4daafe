// Activations on vectors of fp32, between layers that run in one kernel. NaN stays NaN.
#ifndef ACTIVATIONS_F32
#define ACTIVATIONS_F32

namespace block_sparse {

template <int LANES>
struct Activations {
  using Value = typename Lanes<LANES>::Value;

  BLOCK_SPARSE_INLINE Value all(float a) { return Lanes<LANES>::broadcast(&a); }
  BLOCK_SPARSE_INLINE Value identity(const Value& x) { return x; }
  BLOCK_SPARSE_INLINE Value relu(const Value& x) { return at_least(x, all(0.0f)); }
  BLOCK_SPARSE_INLINE Value clamp(const Value& x, float low, float high) { return at_most(at_least(x, all(low)), all(high)); }
  BLOCK_SPARSE_INLINE Value hardswish(const Value& x) { return x * clamp(x + all(3.0f), 0.0f, 6.0f) * all(1.0f / 6); }
  BLOCK_SPARSE_INLINE Value silu(const Value& x) { return x / (all(1.0f) + exponential(all(0.0f) - x)); }

 private:
#if defined(INDUCTOR_USE_VECTOR_TYPES) && INDUCTOR_USE_VECTOR_TYPES()
  static_assert(LANES == at::vec::Vectorized<float>::size());
  BLOCK_SPARSE_INLINE Value at_least(const Value& x, const Value& low) { return at::vec::clamp_min(x, low); }
  BLOCK_SPARSE_INLINE Value at_most(const Value& x, const Value& high) { return at::vec::clamp_max(x, high); }
  BLOCK_SPARSE_INLINE Value exponential(const Value& x) { return x.exp(); }
#else
  BLOCK_SPARSE_INLINE Value at_least(const Value& x, const Value& low) { return x < low ? low : x; }
  BLOCK_SPARSE_INLINE Value at_most(const Value& x, const Value& high) { return x > high ? high : x; }
  BLOCK_SPARSE_INLINE Value exponential(Value x) {
    for (int i = 0; i < LANES; ++i) x[i] = std::exp(x[i]);
    return x;
  }
#endif
};

}  // namespace block_sparse
#endif
