// Pairs of groups of rows as tasks.
#pragma once

#include <algorithm>
#include <vector>

#include "binding.h"

namespace latent_engine {

// Σ game(a, b, first, last) over all pairs a < b of `groups` groups, in one order whatever the threads. They meet in rounds, in
// each of which a group is in one game (the circle method; with an odd number of groups one rests, and b is `groups`): `first`
// and `last` say whether it is the first and the last round, where a game may begin and finish what belongs to its groups.
// Rounds follow one another if `in_turn`, so that games may add to that; else all games may run at once. Task k · rounds + r is
// game k of round r: the games of the first round, which do more, are spread over the shares of the threads.
template <class F>
double sum_of_games(int64_t groups, bool in_turn, const F& game) {
  const int64_t even = groups + groups % 2, circle = even - 1, rounds = std::max<int64_t>(circle, 0), games = even / 2;
  std::vector<double> sums(games * rounds);
  const auto play = [&](int64_t i) {
    const int64_t k = i / rounds, round = i % rounds;
    const int64_t a = k == 0 ? circle : (round + k) % circle, b = (round + circle - k) % circle;
    sums[i] = game(std::min(a, b), std::max(a, b), round == 0, round + 1 == rounds);
  };
  if (in_turn)
    for (int64_t round = 0; round < rounds; ++round)
      for_each_task(games, [&](int64_t k) { play(k * rounds + round); });
  else
    for_each_task(games * rounds, play);
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace latent_engine
