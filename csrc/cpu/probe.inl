// What rooflines divide by: `rounds` times eight FMAs and eight subtractions of vectors, none of which waits for another, and
// their results, so that none can be left out. Returns how many operations on numbers that were.
template <class T>
static int64_t arithmetic(int64_t rounds, T* out) {
  constexpr int chains = 8;
  const Vec<T> half = broadcast(T(0.5));
  Vec<T> products[chains], differences[chains];
  for (int i = 0; i < chains; ++i) products[i] = broadcast(T(i)), differences[i] = broadcast(T(i) + 2);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < chains; ++i) {
      products[i] = products[i] * half + half;
      differences[i] = half - differences[i];
    }
  }
  *out = 0;
  for (int i = 0; i < chains; ++i) *out += products[i][0] + differences[i][0];
  return 2 * chains * kLanes<T> * rounds;
}
