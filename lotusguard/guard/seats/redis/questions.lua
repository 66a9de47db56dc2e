-- SPDX-License-Identifier: Apache-2.0
-- Questions about one room, which change nothing. The methods of the same names in lotusguard/rules/room_holds.py say what
-- they mean.

-- The users of some holds.
local function names_of(holds)
  local names, seen = {}, {}
  for _, hold in ipairs(holds) do
    if not seen[hold.user] then
      seen[hold.user] = true
      names[#names + 1] = hold.user
    end
  end
  return names
end

function Seats.owns_seat(user) return owns_seat(user) end
function Seats.seats_taken() return room.total.takes_seat end
function Seats.is_idle() return room.users == 0 end

function Seats.awaited()
  local awaited = {}
  for _, hold in ipairs(in_order(Store.all('r'))) do
    if TABLE[hold.state].owns_seat then awaited[#awaited + 1] = hold end
  end
  return names_of(awaited)
end

function Seats.occupants()
  local names = {}
  for _, name in ipairs(Store.names('u')) do
    if read(name).occupies > 0 then names[#names + 1] = name:sub(2) end
  end
  return names
end

-- The number of the last change of who is an occupant, and what has changed since a number: all of them, unless that was
-- a short while ago.
function Seats.occupants_since(number)
  number_changes()
  local changes = {}
  if not number or number > room.news or room.news - number > NEWS_KEPT then
    return {digits(room.news), Seats.occupants(), changes}
  end
  for one = number + 1, room.news do changes[#changes + 1] = news[digits(one)] end
  return {digits(room.news), false, changes}
end

-- Whether anybody is in the call of whom no Matrix user is known.
function Seats.has_strangers() return room.strangers ~= nil end

function Seats.aliases()
  local names = {}
  for alias in pairs(room.aliases) do
    if alias ~= '' then names[#names + 1] = alias end
  end
  return names
end

function Seats.listing_required_since() return unconfirmed.highest() end

function Seats.is_occupied()
  return how_many({'present', 'unseated', 'issued', 'issued_unseated', 'reconnecting'}) > 0
end
