-- SPDX-License-Identifier: Apache-2.0
-- Counting holds, as lotusguard/rules/seat_count.py does: several devices of one user take one seat.

local COUNTED = {'takes_seat', 'full', 'owns_seat', 'removes'}
local users, news = fields('u'), fields('o')
local occupied = {}  -- users whose holds this step has changed → whether they were occupants before

local function new_user()
  return {holds = 0, takes_seat = 0, full = 0, owns_seat = 0, removes = 0, occupies = 0, reserved = {}}
end
local NOBODY = new_user()

local function user_of(name) return users[name] or NOBODY end

local function owns_seat(name)
  local user = user_of(name)
  return user.owns_seat > 0 or user.exempt == true
end

local function add_to(counts, name, by)
  local number = (counts[name] or 0) + by
  counts[name] = number > 0 and number or nil
end

local function add_up(user, rules, by)
  for i = 1, #COUNTED do
    local column = COUNTED[i]
    if rules[column] then
      local before = user[column]
      user[column] = before + by
      if not user.exempt and (before == 0 or before + by == 0) then
        room.total[column] = room.total[column] + by
        if column == 'owns_seat' then room.owners = room.owners + 1 end
      end
    end
  end
  if not rules.unconfirmed then user.occupies = user.occupies + by end
end

-- Count a hold, or no longer (by -1), which must be done before its state changes.
local function count(hold, by)
  local user = users[hold.user]
  if not user then
    user = new_user()
    room.users = room.users + 1
  end
  if occupied[hold.user] == nil then occupied[hold.user] = user.occupies > 0 end
  room.version = room.version + 1
  add_to(room.aliases, hold.alias, by)
  add_to(room.states, hold.state, by)
  if TABLE[hold.state].in_call and hold.user:sub(1, 1) ~= '@' then add_to(room, 'strangers', by) end
  user.holds = user.holds + by
  add_up(user, TABLE[hold.state], by)
  users[hold.user] = user
end

-- Forget a user without holds.
local function forget(name)
  if users[name] and users[name].holds == 0 then
    users[name] = nil
    room.users = room.users - 1
  end
end

-- Number the changes of who is an occupant: so a guard that knows an earlier number need not be told of all of them.
local function number_changes()
  local changes, before = {}, room.news
  for name, was_there in pairs(occupied) do
    local is_there = user_of(name).occupies > 0
    if is_there ~= was_there then changes[#changes + 1] = {name, is_there} end
  end
  room.news = before + #changes
  for place = math.max(1, #changes - NEWS_KEPT + 1), #changes do news[digits(before + place)] = changes[place] end
  for number = before - NEWS_KEPT + 1, math.min(before, room.news - NEWS_KEPT) do news[digits(number)] = nil end
  occupied = {}
end
