#include "device/emulator/faults.h"

#include <algorithm>
#include <stdexcept>

#include "device/emulator/card.h"
#include "device/emulator/emulator.h"

namespace almostgpt::emulator {
namespace {

struct NamedMutation {
  const char* name;
  Mutation mutation;
};
constexpr NamedMutation kMutations[] = {
    {"drop", Mutation::drop},       {"lax", Mutation::lax},         {"parity", Mutation::parity},
    {"bytes", Mutation::bytes},     {"relaxed", Mutation::relaxed}, {"stride", Mutation::stride},
    {"double", Mutation::arrive_twice},
};

struct Site {
  std::string name;
  const Fault* fault;
};

// In order of appearance.
std::vector<Site>& seen_sites() {
  static std::vector<Site> sites;
  return sites;
}

std::string injected_site;
Mutation injected_mutation = Mutation::none;
bool injected_site_ran = false;

}  // namespace

uint32_t Fault::generation_ = 1;

Fault::Fault(const char* name, std::initializer_list<const char*> its_mutations)
    : primitive(name), mutations(its_mutations) {}

Mutation Fault::look_up(Location location) const {
  const std::string name = text(location) + " " + primitive;
  auto& sites = seen_sites();
  if (std::none_of(sites.begin(), sites.end(), [&](const Site& site) { return site.name == name; }))
    sites.push_back({name, this});
  const Mutation mutation = name == injected_site ? injected_mutation : Mutation::none;
  injected_site_ran |= mutation != Mutation::none;
  recent_[static_cast<unsigned>(location.line) % kRecent] = {location, generation_, mutation};
  return mutation;
}

std::string sites() {
  const NoOtherSession lock;
  std::string json = "[";
  const char* separator = "";
  for (const Site& site : seen_sites()) {
    json += std::string(separator) + "{\"site\": \"" + site.name + "\", \"mutations\": [";
    const char* inner = "";
    for (const char* mutation : site.fault->mutations) {
      json += std::string(inner) + '"' + mutation + '"';
      inner = ", ";
    }
    json += "]}";
    separator = ", ";
  }
  return json + "]";
}

bool injected_ran() {
  const NoOtherSession lock;
  return injected_site_ran;
}

void forget_sites() {
  seen_sites().clear();
  Fault::forget_recent();
}

void inject(const std::string& site, const std::string& mutation) {
  Mutation chosen = Mutation::none;
  for (const NamedMutation& known : kMutations)
    if (mutation == known.name) chosen = known.mutation;
  if (!site.empty() && chosen == Mutation::none)
    throw std::invalid_argument("inject: no primitive has the mutation '" + mutation + "'");
  const NoOtherSession lock;
  if (!site.empty() && !injected_site.empty())
    throw std::invalid_argument("inject: one fault at a time; " + injected_site + " is in force");
  for (const Site& seen : seen_sites())
    if (seen.name == site &&
        std::none_of(seen.fault->mutations.begin(), seen.fault->mutations.end(),
                     [&](const char* allowed) { return mutation == allowed; }))
      throw std::invalid_argument("inject: " + std::string(seen.fault->primitive) + " has no mutation '" + mutation + "'");
  injected_site = site;
  injected_mutation = site.empty() ? Mutation::none : chosen;
  injected_site_ran = false;
  Fault::forget_recent();
}

}  // namespace almostgpt::emulator
